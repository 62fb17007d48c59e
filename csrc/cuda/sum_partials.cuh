// out[i] = Σ_j partial[i, j]
//
// partial [n, count] holds the blocks' sums of squares of one layer. A warp owns an example: lane l adds the partials
// l, l + 32, … in order and in double, then the warp adds its lanes, so that every run gives the same bits. The kernel
// reads n·count elements once.
#pragma once

#include "reduce.cuh"
#include "sum_partials.h"

namespace engm::cuda {

constexpr int kSumThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kSumThreads) sum_partials_kernel(SumPartials p) {
  const int lane = threadIdx.x % 32;
  const int64_t example = int64_t(blockIdx.x) * (kSumThreads / 32) + threadIdx.x / 32;
  if (example >= p.n || (p.done != nullptr && p.done[example])) return;  // whole warps leave
  const T* partial = static_cast<const T*>(p.partial) + example * p.count;
  double total = 0;
  for (int64_t j = lane; j < p.count; j += 32) total += double(partial[j]);
  total = warp_sum(total);
  if (lane == 0) static_cast<T*>(p.out)[example] = T(total);
}

}  // namespace engm::cuda
