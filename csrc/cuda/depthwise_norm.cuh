// Direct form of depthwise convolutions:
//
//   ‖G_i‖²,  G_i[o, tap] = Σ_t gy[i, o, t] x[i, o / m, t·stride + tap·dilation - padding]
//
// x [n, C, in] and gy [n, C·m, out] have any strides; a group has one input channel and m output channels. A matrix
// instruction would find nothing to use twice: sums are plain fused multiply-adds in float (double for double), kTaps
// of them in registers while the positions go by, and larger kernels take several rounds. A block owns 32 output
// channels of an example. Where positions are contiguous, each of its warps owns an output channel and the lanes split
// the positions; where channels are, a lane owns an output channel, and the warps split the positions and are added in
// order through shared memory. A block writes one partial sum. It reads gy once and x once from L2 for every kTaps
// taps, and the taps of x from L1.
#pragma once

#include "depthwise_norm.h"
#include "pack.cuh"
#include "reduce.cuh"

namespace engm::cuda {

struct DepthwiseTile {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps, kTaps = 9;
  static constexpr int kShared = kWarps * kTaps * 32 + kWarps;  // elements
};

// Finishes the gradient of output channel o at one tap: corrects it, writes it where it is wanted, and returns its
// square.
template <typename Sum>
__device__ __forceinline__ Sum depthwise_square(const DirectNorm& p, Sum v, int64_t example, int o, int tap) {
  const Geometry& g = p.geometry;
  const int64_t taps = g.taps(), io = example * g.groups * g.rows + o, at = o * taps + tap;
  if (p.shift != nullptr)
    v -= static_cast<const Sum*>(p.shift)[io] * static_cast<const Sum*>(p.patch_mean)[o / g.rows * taps + tap] +
         static_cast<const Sum*>(p.scale)[io] * static_cast<const Sum*>(p.correlation)[at];
  if (p.grads != nullptr) static_cast<Sum*>(p.grads)[io * taps + tap] = v;
  return v * v;
}

// Adds gy·x of positions first, first + step, … of output channel o to the sums of taps [first_tap, first_tap + count).
template <typename E, typename Sum>
__device__ __forceinline__ void depthwise_sums(const DirectNorm& p, int64_t example, int o, int first_tap, int count,
                                               unsigned first, unsigned step, Sum (&sums)[DepthwiseTile::kTaps]) {
  const Geometry& g = p.geometry;
  const E* x = static_cast<const E*>(p.x.data) + example * p.x.example + o / g.rows * p.x.channel;
  const E* gy = static_cast<const E*>(p.gy.data) + example * p.gy.example + o * p.gy.channel;
  const int slice = g.kernel[1] * g.kernel[2];
  int at_z[DepthwiseTile::kTaps], at_y[DepthwiseTile::kTaps], at_x[DepthwiseTile::kTaps];
#pragma unroll
  for (int j = 0; j < DepthwiseTile::kTaps; ++j) {
    const int tap = first_tap + (j < count ? j : 0);
    at_z[j] = tap / slice * g.dilation[0] - g.padding[0];
    at_y[j] = tap % slice / g.kernel[2] * g.dilation[1] - g.padding[1];
    at_x[j] = tap % g.kernel[2] * g.dilation[2] - g.padding[2];
  }
  const unsigned positions = unsigned(g.positions()), width = unsigned(g.out[2]), height = unsigned(g.out[1]);
#pragma unroll 1
  for (unsigned t = first; t < positions; t += step) {
    const unsigned line = t / width;
    const int tx = int(t - line * width), tz = int(line / height), ty = int(line) - tz * int(height);
    const Sum b = to_float(gy[tz * p.gy.space[0] + ty * p.gy.space[1] + tx * p.gy.space[2]]);
    // There are no branches, so that the taps' loads go out together.
#pragma unroll
    for (int j = 0; j < DepthwiseTile::kTaps; ++j) {
      const int z = tz * g.stride[0] + at_z[j], y = ty * g.stride[1] + at_y[j], w = tx * g.stride[2] + at_x[j];
      const bool inside = (j < count) & (unsigned(z) < unsigned(g.in[0])) & (unsigned(y) < unsigned(g.in[1])) &
                          (unsigned(w) < unsigned(g.in[2]));
      const Sum v = to_float(x[inside ? z * p.x.space[0] + y * p.x.space[1] + w * p.x.space[2] : 0]);
      if (inside) sums[j] += b * v;
    }
  }
}

template <typename E, bool kByChannel>
__global__ void __launch_bounds__(DepthwiseTile::kThreads, 2) depthwise_norm_kernel(DirectNorm p) {
  using Sum = typename SumOf<E>::Type;
  using Tile = DepthwiseTile;
  ENGM_SHARED(Sum, shared);
  const Geometry& g = p.geometry;
  const int64_t tiles = depthwise_tiles(g), example = blockIdx.x / tiles;
  if (p.done != nullptr && p.done[example]) return;
  const int first = int(blockIdx.x % tiles) * 32, outputs = g.groups * g.rows;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Sum total = 0;
  for (int tap = 0; tap < g.taps(); tap += Tile::kTaps) {
    const int count = g.taps() - tap < Tile::kTaps ? g.taps() - tap : Tile::kTaps;
    if constexpr (kByChannel) {
      Sum sums[Tile::kTaps] = {};
      if (first + lane < outputs)
        depthwise_sums<E>(p, example, first + lane, tap, count, warp, Tile::kWarps, sums);
#pragma unroll
      for (int j = 0; j < Tile::kTaps; ++j) shared[(warp * Tile::kTaps + j) * 32 + lane] = sums[j];
      __syncthreads();
      for (int j = warp; j < count; j += Tile::kWarps) {
        Sum v = 0;
        for (int w = 0; w < Tile::kWarps; ++w) v += shared[(w * Tile::kTaps + j) * 32 + lane];
        if (first + lane < outputs) total += depthwise_square(p, v, example, first + lane, tap + j);
      }
      __syncthreads();  // the next taps write here
    } else {
      for (int o = first + warp; o < first + 32 && o < outputs; o += Tile::kWarps) {
        Sum sums[Tile::kTaps] = {};
        depthwise_sums<E>(p, example, o, tap, count, lane, 32, sums);
#pragma unroll
        for (int j = 0; j < Tile::kTaps; ++j) {
          const Sum v = warp_sum(sums[j]);
          if (lane == j && j < count) total += depthwise_square(p, v, example, o, tap + j);
        }
      }
    }
  }
  total = block_sum<Tile::kThreads>(total, shared + Tile::kWarps * Tile::kTaps * 32);
  if (threadIdx.x == 0) static_cast<Sum*>(p.partial)[blockIdx.x] = total;
}

}  // namespace engm::cuda
