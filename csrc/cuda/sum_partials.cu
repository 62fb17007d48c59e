// Launches the kernel that adds up the partial sums of each example.
#include "sum_partials.cuh"

#include "launch.cuh"

namespace engm::cuda {

int launch_sum_partials(const SumPartials& p, void* stream) {
  const int64_t blocks = (p.n + kSumThreads / 32 - 1) / (kSumThreads / 32);
  return p.is_double ? launch(sum_partials_kernel<double>, blocks, kSumThreads, 0, stream, p)
                     : launch(sum_partials_kernel<float>, blocks, kSumThreads, 0, stream, p);
}

}  // namespace engm::cuda
