// Instantiates the Gram form with fp16 operands.
#include "gram_norm_launch.cuh"

namespace engm::cuda {

template int launch_gram<Float16>(const GramNorm&, void*);

}  // namespace engm::cuda
