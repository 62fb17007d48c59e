// Instantiates the direct form of convolutions with fp16 operands.
#include "conv_norm.cuh"

namespace engm::cuda {

template int run_conv<Float16>(const DirectNorm&, void*);

}  // namespace engm::cuda
