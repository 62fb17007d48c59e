// Instantiates the Gram form with fp32 operands rounded to TF32.
#include "gram_norm_launch.cuh"

namespace engm::cuda {

template int launch_gram<Tf32>(const GramNorm&, void*);

}  // namespace engm::cuda
