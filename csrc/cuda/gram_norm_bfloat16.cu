// Instantiates the Gram form with bf16 operands.
#include "gram_norm_launch.cuh"

namespace engm::cuda {

template int launch_gram<BFloat16>(const GramNorm&, void*);

}  // namespace engm::cuda
