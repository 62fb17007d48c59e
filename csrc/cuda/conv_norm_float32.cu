// Instantiates the direct form of convolutions with fp32 operands, three TF32 products each.
#include "conv_norm.cuh"

namespace engm::cuda {

template int run_conv<Tf32x3>(const DirectNorm&, void*);

}  // namespace engm::cuda
