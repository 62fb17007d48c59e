// Instantiates the direct form of convolutions with double operands.
#include "conv_norm.cuh"

namespace engm::cuda {

template int run_conv<Float64>(const DirectNorm&, void*);

}  // namespace engm::cuda
