// Instantiates the direct form of linear layers with bf16 operands.
#include "gemm_norm.cuh"

namespace engm::cuda {

template int run_gemm<BFloat16>(const DirectNorm&, void*);

}  // namespace engm::cuda
