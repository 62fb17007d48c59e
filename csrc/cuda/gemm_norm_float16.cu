// Instantiates the direct form of linear layers with fp16 operands.
#include "gemm_norm.cuh"

namespace engm::cuda {

template int run_gemm<Float16>(const DirectNorm&, void*);

}  // namespace engm::cuda
