// Instantiates the Gram form with double operands.
#include "gram_norm_launch.cuh"

namespace engm::cuda {

template int launch_gram<Float64>(const GramNorm&, void*);

}  // namespace engm::cuda
