// Instantiates the Gram form with fp32 operands, three TF32 products each.
#include "gram_norm_launch.cuh"

namespace engm::cuda {

template int launch_gram<Tf32x3>(const GramNorm&, void*);

}  // namespace engm::cuda
