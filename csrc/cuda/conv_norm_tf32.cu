// Instantiates the direct form of convolutions with fp32 operands rounded to TF32.
#include "conv_norm.cuh"

namespace engm::cuda {

template int run_conv<Tf32InPlace>(const DirectNorm&, void*);

}  // namespace engm::cuda
