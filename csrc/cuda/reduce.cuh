// Adds up the values of a warp's lanes or of a block's threads, in a fixed order, so that every run gives the same
// bits.
#pragma once

#include "ptx.cuh"

namespace engm::cuda {

// The sum over the warp's lanes, returned to all of them.
template <typename T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) v += shuffle_xor(v, mask);
  return v;
}

// The sum over the block, returned to thread 0 (others get 0). scratch: kThreads / 32 elements of shared memory that
// nobody else uses; a barrier is needed before it is used again.
template <int kThreads, typename T>
__device__ __forceinline__ T block_sum(T v, T* scratch) {
  static_assert(kThreads % 32 == 0);
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  T total = 0;
  if (threadIdx.x == 0)
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) total += scratch[w];
  return total;
}

}  // namespace engm::cuda
