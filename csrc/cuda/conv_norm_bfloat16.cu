// Instantiates the direct form of convolutions with bf16 operands.
#include "conv_norm.cuh"

namespace engm::cuda {

template int run_conv<BFloat16>(const DirectNorm&, void*);

}  // namespace engm::cuda
