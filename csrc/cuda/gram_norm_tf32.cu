#include "gram_norm_launch.cuh"

namespace engm::cuda {

template int launch_gram<Tf32>(const GramNorm&, void*);

}  // namespace engm::cuda
