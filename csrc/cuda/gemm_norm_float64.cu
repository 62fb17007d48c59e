// Instantiates the direct form of linear layers with double operands.
#include "gemm_norm.cuh"

namespace engm::cuda {

template int run_gemm<Float64>(const DirectNorm&, void*);

}  // namespace engm::cuda
