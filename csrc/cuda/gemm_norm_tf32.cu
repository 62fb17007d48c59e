// Instantiates the direct form of linear layers with fp32 operands rounded to TF32.
#include "gemm_norm.cuh"

namespace engm::cuda {

template int run_gemm<Tf32InPlace>(const DirectNorm&, void*);

}  // namespace engm::cuda
