// Instantiates the direct form of linear layers with fp32 operands, three TF32 products each.
#include "gemm_norm.cuh"

namespace engm::cuda {

template int run_gemm<Tf32x3>(const DirectNorm&, void*);

}  // namespace engm::cuda
