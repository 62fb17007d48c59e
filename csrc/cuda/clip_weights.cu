// Launches clip_weights.cuh.
#include "clip_weights.cuh"

#include "launch.cuh"

namespace engm::cuda {

int launch_clip_weights(const ClipWeights& p, void* stream) {
  const int64_t blocks = (p.n + kClipThreads - 1) / kClipThreads;
  return launch(p.is_double ? clip_weights_kernel<double> : clip_weights_kernel<float>, blocks, kClipThreads, 0, stream,
                p);
}

}  // namespace engm::cuda
