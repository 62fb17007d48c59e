// out[i] = ‖a_i‖²‖b_i‖²: the squared norm of a linear layer's weight gradient at a single position.
//
// a [n, channels] and b [n, rows] have any strides. A block owns one example and reads it once, n·(channels + rows)
// elements in all, 16 bytes a load where rows are contiguous and aligned.
#pragma once

#include "gram_norm.h"
#include "reduce.cuh"

namespace engm::cuda {

constexpr int kRankOneThreads = 128;

template <typename E>
struct alignas(16) RankOnePiece {
  E e[16 / sizeof(E)];
};

// This thread's part of Σ v². It is formed in double, for one factor may be as small as the other is large.
template <typename E>
__device__ __forceinline__ double rank_one_part(const E* v, int64_t step, int64_t count, bool vectors) {
  constexpr int kPiece = 16 / int(sizeof(E));
  double sum = 0;
  int64_t first = 0;
  if (vectors) {
    first = count / kPiece * kPiece;
    for (int64_t i = threadIdx.x; i < count / kPiece; i += kRankOneThreads) {
      const RankOnePiece<E> piece = reinterpret_cast<const RankOnePiece<E>*>(v)[i];
#pragma unroll
      for (int j = 0; j < kPiece; ++j) {
        const double value = to_float(piece.e[j]);
        sum += value * value;
      }
    }
  }
  for (int64_t i = first + threadIdx.x; i < count; i += kRankOneThreads) {
    const double value = to_float(v[i * step]);
    sum += value * value;
  }
  return sum;
}

// A block owns one example.
template <typename E, typename Sum>
__global__ __launch_bounds__(kRankOneThreads) void rank_one_kernel(RankOne p) {
  ENGM_SHARED(double, scratch);
  const int64_t i = blockIdx.x;
  const E* const a = static_cast<const E*>(p.a.data) + i * p.a.example;
  const E* const b = static_cast<const E*>(p.b.data) + i * p.b.example;
  const double a_part = rank_one_part<E>(a, p.a.channel, p.channels, p.a_vectors);
  const double b_part = rank_one_part<E>(b, p.b.channel, p.rows, p.b_vectors);
  const double a_sq = block_sum<kRankOneThreads>(a_part, scratch);
  const double b_sq = block_sum<kRankOneThreads>(b_part, scratch + kRankOneThreads / 32);
  if (threadIdx.x == 0) static_cast<Sum*>(p.out)[i] = Sum(a_sq * b_sq);
}

}  // namespace engm::cuda
