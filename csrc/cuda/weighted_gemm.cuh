// out[o, c] = Σ_k w[k / T] b[k, o] a[k, c]        a [n·T, p], b [n·T, d], w [n]
//
// A block owns a kTile x kTile tile of the result over one split of the rows k; each of its 2 x 4 warps owns a half by
// a quarter of the tile. Rows go from memory through registers to one of two stages of shared memory, kStep at a time,
// those of the next stage while the tensor cores work on this one. Rows of b are multiplied by their weights in float
// on the way (and rounded again to 16 bits, as by scaling first). a is read d / kTile times and b p / kTile times. The
// sums of the splits lie side by side, and a second kernel adds them in order, so that every run gives the same bits.
#pragma once

#include "mma.cuh"
#include "pack.cuh"
#include "weighted_gemm.h"

namespace engm::cuda {

constexpr int kGemmThreads = 256, kGemmWarpsM = 2, kGemmWarpsN = 4;

template <typename P>
struct GemmTile {
  using Element = typename P::Element;
  // The fragments of Tf32x3 and sums in double take twice the registers.
  static constexpr int kTile = sizeof(Element) == 8 || sizeof(typename P::A) == 32 ? 64 : 128;
  static constexpr int kStep = sizeof(Element) == 8 ? 16 : 32;
  static constexpr int kPitch = kTile + P::kPad;
  static constexpr int kPack = 16 / sizeof(Element), kPacksOfRow = kTile / kPack;
  static constexpr int kPacks = kStep * kPacksOfRow / kGemmThreads;  // of a thread, of one operand and stage
  static constexpr int kOperandElements = kStep * kPitch, kStageElements = 2 * kOperandElements;
  static constexpr int kSharedBytes = 2 * kStageElements * sizeof(Element);
  static constexpr int kWarpM = kTile / kGemmWarpsM, kWarpN = kTile / kGemmWarpsN;
  static constexpr int kM = kWarpM / P::kM, kN = kWarpN / P::kN;  // of a warp
  static_assert(kStep * kPacksOfRow % kGemmThreads == 0 && kStep % P::kK == 0);
  static_assert(kPitch * sizeof(Element) % 16 == 0);
};

// Holds a thread's part of kStep rows of one operand, on its way to shared memory.
template <typename P>
struct Staged {
  using Tile = GemmTile<P>;
  using Element = typename P::Element;
  Pack<Element, Tile::kPack> packs[Tile::kPacks];

  static __device__ __forceinline__ int row(int j) {
    return (int(threadIdx.x) + j * kGemmThreads) / Tile::kPacksOfRow;
  }
  static __device__ __forceinline__ int column(int j) {
    return (int(threadIdx.x) + j * kGemmThreads) % Tile::kPacksOfRow * Tile::kPack;
  }
  // Loads rows from `begin` on, zero from `end` on, and columns from `first` on, zero from `width` on.
  __device__ __forceinline__ void fetch(const void* data, int64_t pitch, bool aligned, int begin, int end, int first,
                                        int width) {
#pragma unroll
    for (int j = 0; j < Tile::kPacks; ++j) {
      const int k = begin + row(j), c = first + column(j);
      const Element* from = static_cast<const Element*>(data) + k * pitch + c;
      packs[j] = {};
      if (k >= end) continue;
      if (aligned) {
        if (c < width) packs[j] = load_pack<Element, Tile::kPack>(from);
      } else {
#pragma unroll
        for (int e = 0; e < Tile::kPack; ++e)
          if (c + e < width) packs[j].at[e] = from[e];
      }
    }
  }
  __device__ __forceinline__ void scale(const typename P::Sum* weights, int positions, int begin, int end) {
#pragma unroll
    for (int j = 0; j < Tile::kPacks; ++j) {
      const int k = begin + row(j);
      if (k >= end) continue;
      const typename P::Sum w = weights[k / positions];
#pragma unroll
      for (int e = 0; e < Tile::kPack; ++e) packs[j].at[e] = scaled(packs[j].at[e], w);
    }
  }
  __device__ __forceinline__ void store(Element* shared) const {
#pragma unroll
    for (int j = 0; j < Tile::kPacks; ++j) store_pack(shared + row(j) * Tile::kPitch + column(j), packs[j]);
  }
};

// Adds the kStep rows of one stage to a warp's kWarpM x kWarpN tile.
template <typename P>
__device__ __forceinline__ void multiply_stage(typename P::Sum (&sums)[GemmTile<P>::kM][GemmTile<P>::kN][P::kSums],
                                         const typename P::Element* b, const typename P::Element* a, int lane) {
  using Tile = GemmTile<P>;
  int b_at[P::kRows], a_at[P::kRows];
#pragma unroll
  for (int j = 0; j < P::kRows; ++j) {
    b_at[j] = P::a_row(lane, j) * Tile::kPitch + P::a_column(lane);
    a_at[j] = P::b_row(lane, j) * Tile::kPitch + P::b_column(lane);
  }
#pragma unroll
  for (int k = 0; k < Tile::kStep; k += P::kK) {
    typename P::A left[Tile::kM];
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m) P::load_a(left[m], b + k * Tile::kPitch + m * P::kM, b_at);
#pragma unroll
    for (int n = 0; n < Tile::kN; ++n) {
      typename P::B right;
      P::load_b(right, a + k * Tile::kPitch + n * P::kN, a_at);
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m) P::mma(sums[m][n], left[m], right);
    }
  }
}

// A block owns (split, tile of d, tile of p), the last going fastest.
template <typename P>
__global__ void __launch_bounds__(kGemmThreads) weighted_gemm_kernel(WeightedGemm g) {
  using Tile = GemmTile<P>;
  using Sum = typename P::Sum;
  ENGM_SHARED(typename P::Element, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tiles_n = (g.p + Tile::kTile - 1) / Tile::kTile, tiles_m = (g.d + Tile::kTile - 1) / Tile::kTile;
  const int first_n = int(blockIdx.x) % tiles_n * Tile::kTile;
  const int first_m = int(blockIdx.x) / tiles_n % tiles_m * Tile::kTile;
  const int split = int(blockIdx.x) / tiles_n / tiles_m;
  const int steps = (g.rows + Tile::kStep - 1) / Tile::kStep, steps_of_split = (steps + g.splits - 1) / g.splits;
  const int first_step = split * steps_of_split;
  const int last_step = first_step + steps_of_split < steps ? first_step + steps_of_split : steps;
  const int warp_m = warp / kGemmWarpsN * Tile::kWarpM, warp_n = warp % kGemmWarpsN * Tile::kWarpN;

  Staged<P> a, b;
  const auto fetch = [&](int step) {
    a.fetch(g.a, g.a_pitch, g.a_aligned, step * Tile::kStep, g.rows, first_n, g.p);
    b.fetch(g.b, g.b_pitch, g.b_aligned, step * Tile::kStep, g.rows, first_m, g.d);
  };
  const auto store = [&](int step) {
    typename P::Element* stage = shared + (step - first_step) % 2 * Tile::kStageElements;
    b.scale(static_cast<const Sum*>(g.weights), g.positions, step * Tile::kStep, g.rows);
    b.store(stage);
    a.store(stage + Tile::kOperandElements);
  };
  Sum sums[Tile::kM][Tile::kN][P::kSums] = {};
  if (first_step < last_step) {
    fetch(first_step);
    store(first_step);
  }
  __syncthreads();
  for (int step = first_step; step < last_step; ++step) {
    const bool more = step + 1 < last_step;
    if (more) fetch(step + 1);
    const typename P::Element* stage = shared + (step - first_step) % 2 * Tile::kStageElements;
    multiply_stage<P>(sums, stage + warp_m, stage + Tile::kOperandElements + warp_n, lane);
    if (more) store(step + 1);
    __syncthreads();
  }

  Sum* out = g.splits > 1 ? static_cast<Sum*>(g.parts) + int64_t(split) * g.d * g.p : static_cast<Sum*>(g.out);
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m)
#pragma unroll
    for (int n = 0; n < Tile::kN; ++n)
#pragma unroll
      for (int e = 0; e < P::kSums; ++e) {
        const int o = first_m + warp_m + m * P::kM + P::sum_m(lane, e);
        const int c = first_n + warp_n + n * P::kN + P::sum_n(lane, e);
        if (o < g.d && c < g.p) out[int64_t(o) * g.p + c] = sums[m][n][e];
      }
}

// Adds the splits. A thread owns one element.
template <typename Sum>
__global__ void __launch_bounds__(kGemmThreads) weighted_gemm_finish_kernel(WeightedGemm g) {
  const int64_t size = int64_t(g.d) * g.p, at = int64_t(blockIdx.x) * kGemmThreads + threadIdx.x;
  if (at >= size) return;
  Sum total = 0;
#pragma unroll 4
  for (int split = 0; split < g.splits; ++split) total += static_cast<const Sum*>(g.parts)[split * size + at];
  static_cast<Sum*>(g.out)[at] = total;
}

}  // namespace engm::cuda
