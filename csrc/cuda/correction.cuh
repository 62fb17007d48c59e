// What a batch norm in training mode takes off the gradients of the layer in front of it, as far as one pass over the
// layer's output and one over its input give it.
//
// correction_factors:  normalised[i, c, t] = (y[i, c, t] - mean[c]) rstd[c] / N
//                      gained_shift[i, c] = gain[c] shift[i, c]      gained_scale[i, c] = gain[c] scale[i, c] / N
//   A block owns a stretch of one example's y in either order of memory, four accesses of 16 bytes a thread, and the first
//   block of an example its channels, too. A thread finds its channel by one division and steps on from there.
//
// patch_mean:  sums[c, tap] = share Σ_i Σ_t x[i, c, t·stride + tap·dilation - padding], 0 outside of the image
//   weighting.cuh adds the images of a channel up over the examples. Here a team of threads owns a tap of a channel and
//   adds what its output positions read of that one image: a warp or a block where pixels are dense; where channels are,
//   a block owns a tap of 32 channels, one a lane. Sums go in a fixed order.
//
// The bytes bound both: n·d·T elements are read and written once, n·C·pixels read once. Over the 20 layers of a
// ResNet-18 in fp32 at n = 128 a copy's speed allows 110 µs on an H200 for the factors, where a division of integers and
// one of doubles an element took 486, and 62 µs for the means, where divisions a pixel and tap took 621.
#pragma once

#include "correction.h"
#include "pack.cuh"
#include "reduce.cuh"

namespace engm::cuda {

constexpr int kCorrectionThreads = 256, kCorrectionWarps = kCorrectionThreads / 32;
template <int kPack>
constexpr int kFactorLoads = kPack == 1 ? 8 : 4;  // accesses of a thread

struct FactorsLaunch {
  CorrectionFactors p;
  int packs, in_run;             // of an example; of its runs along the dense dimension
  int runs_a_step, packs_a_step;  // kCorrectionThreads packs further on is so many runs and packs
  int blocks;                    // of an example
};

// Loads statistics by 16 bytes.
template <int kPack, typename Sum>
__device__ __forceinline__ void load_sums(const Sum* from, Sum (&to)[kPack]) {
  constexpr int kEach = kPack * sizeof(Sum) < 16 ? kPack : 16 / sizeof(Sum);
#pragma unroll
  for (int k = 0; k < kPack; k += kEach) {
    const Pack<Sum, kEach> pack = load_pack<Sum, kEach>(from + k);
#pragma unroll
    for (int e = 0; e < kEach; ++e) to[k + e] = pack.at[e];
  }
}

template <typename T, int kPack, bool kChannelsLast>
__global__ void __launch_bounds__(kCorrectionThreads, 4) correction_factors_kernel(FactorsLaunch launched) {
  using Sum = typename SumOf<T>::Type;
  const CorrectionFactors& p = launched.p;
  constexpr int kLoads = kFactorLoads<kPack>;
  const int64_t i = int(blockIdx.x) / launched.blocks;
  const int block = int(blockIdx.x) % launched.blocks, first = block * kCorrectionThreads * kLoads + int(threadIdx.x);
  const Sum *mean = static_cast<const Sum*>(p.mean), *rstd = static_cast<const Sum*>(p.rstd), share = Sum(p.share);
  if (first < launched.packs) {
    const T* y = static_cast<const T*>(p.outputs) + i * launched.packs * kPack;
    T* normalised = static_cast<T*>(p.normalised) + i * launched.packs * kPack;
    Pack<T, kPack> packs[kLoads];
    int of_run[kLoads];  // packs of channels
    Sum of_row[2][kLoads];
    int run = first / launched.in_run, pack = first % launched.in_run;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int at = first + k * kCorrectionThreads;
      const bool there = at < launched.packs;
      packs[k] = load_pack_or_zero<T, kPack>(y + int64_t(there ? at : first) * kPack, there);
      of_run[k] = pack;
      if (!kChannelsLast) of_row[0][k] = mean[there ? run : 0], of_row[1][k] = rstd[there ? run : 0];
      run += launched.runs_a_step, pack += launched.packs_a_step;
      if (pack >= launched.in_run) pack -= launched.in_run, ++run;
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      Sum means[kPack], factors[kPack];
      if (kChannelsLast) {
        load_sums<kPack>(mean + of_run[k] * kPack, means), load_sums<kPack>(rstd + of_run[k] * kPack, factors);
      } else {
#pragma unroll
        for (int e = 0; e < kPack; ++e) means[e] = of_row[0][k], factors[e] = of_row[1][k];
      }
#pragma unroll
      for (int e = 0; e < kPack; ++e)
        from_float((to_float(packs[k].at[e]) - means[e]) * (factors[e] * share), packs[k].at[e]);
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int at = first + k * kCorrectionThreads;
      if (at < launched.packs) store_pack(normalised + int64_t(at) * kPack, packs[k]);
    }
  }
  if (block != 0) return;
#pragma unroll 1
  for (int64_t c = threadIdx.x; c < p.channels; c += kCorrectionThreads) {
    const int64_t at = i * p.channels + c;
    const Sum gain = static_cast<const Sum*>(p.gain)[c];
    static_cast<Sum*>(p.gained_shift)[at] = static_cast<const Sum*>(p.shift)[at] * gain;
    static_cast<Sum*>(p.gained_scale)[at] = static_cast<const Sum*>(p.scale)[at] * (gain * share);
  }
}

// A block has kCorrectionThreads / team teams, which own neighbouring taps; with channels_last a team is the block.
template <typename Sum>
__global__ void __launch_bounds__(kCorrectionThreads) patch_mean_kernel(PatchMean p) {
  ENGM_SHARED(Sum, scratch);  // [warps, 32]
  const Geometry& g = p.geometry;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, taps = g.taps();
  const int teams = kCorrectionThreads / p.team;
  const int64_t owned = int64_t(blockIdx.x) * teams + int(threadIdx.x) / p.team;  // the tap goes fastest
  const int tap = int(owned % taps);
  const int64_t c = p.channels_last ? owned / taps * 32 + lane : owned / taps;
  Sum total = 0;
  if (c < p.channels) {
    const int first[3] = {tap / g.kernel[2] / g.kernel[1] * g.dilation[0] - g.padding[0],
                          tap / g.kernel[2] % g.kernel[1] * g.dilation[1] - g.padding[1],
                          tap % g.kernel[2] * g.dilation[2] - g.padding[2]};
    const Sum* image = static_cast<const Sum*>(p.totals) + (p.channels_last ? c : c * g.pixels());
    const int64_t step = p.channels_last ? p.channels : 1;
    const int begin = p.channels_last ? warp : int(threadIdx.x) % p.team;
    const int each = p.channels_last ? kCorrectionWarps : p.team, positions = int(g.positions());
#pragma unroll 4
    for (int t = begin; t < positions; t += each) {
      const int line = t / g.out[2];
      const int x = t % g.out[2] * g.stride[2] + first[2], y = line % g.out[1] * g.stride[1] + first[1];
      const int z = line / g.out[1] * g.stride[0] + first[0];
      const bool inside = unsigned(x) < unsigned(g.in[2]) && unsigned(y) < unsigned(g.in[1]) &&
                          unsigned(z) < unsigned(g.in[0]);
      const Sum pixel = image[inside ? ((int64_t(z) * g.in[1] + y) * g.in[2] + x) * step : 0];
      total += inside ? pixel : Sum(0);
    }
  }
  if (!p.channels_last) total = warp_sum(total);
  if (p.team > 32) {
    scratch[warp * 32 + lane] = total;
    __syncthreads();
    if (warp != 0) return;
    total = 0;
#pragma unroll
    for (int w = 0; w < kCorrectionWarps; ++w) total += scratch[w * 32 + lane];
  }
  if (c < p.channels && (p.channels_last || lane == 0))
    static_cast<Sum*>(p.sums)[c * taps + tap] = total * Sum(p.share);
}

}  // namespace engm::cuda
