// What a batch norm in training mode takes off the gradients of the layer in front of it, as far as one pass over the
// layer's output and one over its input give it.
//
// correction_factors:  normalised[i, c, t] = (y[i, c, t] - mean[c]) rstd[c] / N
//                      gained_shift[i, c] = gain[c] shift[i, c]      gained_scale[i, c] = gain[c] scale[i, c] / N
//   A thread owns elements a grid apart; neighbours own neighbours. It reads and writes n·d·T elements once.
//
// patch_mean:  sums[split, c, tap] = share Σ_i Σ_t x[i, c, t·stride + tap·dilation - padding], 0 outside of the image
//   Rows (pixels dense): a block owns one channel, a split of the examples and kPatchTaps taps; its threads own pixels.
//   Columns (channels dense): a block owns 32 channels, one a lane, and its warps own pixels.
//   A thread adds a pixel up over examples before it asks which taps read it. x is read once for every kPatchTaps taps;
//   the sums go in a fixed order, without atomics.
#pragma once

#include "correction.h"
#include "pack.cuh"
#include "reduce.cuh"

namespace engm::cuda {

constexpr int kCorrectionThreads = 256, kPatchTaps = 9, kPatchWarps = kCorrectionThreads / 32;

template <typename T>
__global__ void __launch_bounds__(kCorrectionThreads) correction_factors_kernel(CorrectionFactors p) {
  using Sum = typename SumOf<T>::Type;
  const Sum *mean = static_cast<const Sum*>(p.mean), *rstd = static_cast<const Sum*>(p.rstd);
  const int64_t step = int64_t(gridDim.x) * kCorrectionThreads;
  const int64_t first = int64_t(blockIdx.x) * kCorrectionThreads + threadIdx.x;
  const int64_t run = p.channels_last ? 1 : p.positions, total = p.n * p.channels * p.positions;
  for (int64_t k = first; k < total; k += step) {
    const int64_t c = k / run % p.channels;
    const Sum centred = Sum(to_float(static_cast<const T*>(p.outputs)[k])) - mean[c];
    from_float(centred * Sum(rstd[c] / p.root), static_cast<T*>(p.normalised)[k]);
  }
  for (int64_t k = first; k < p.n * p.channels; k += step) {
    const Sum gain = static_cast<const Sum*>(p.gain)[k % p.channels];
    static_cast<Sum*>(p.gained_shift)[k] = static_cast<const Sum*>(p.shift)[k] * gain;
    static_cast<Sum*>(p.gained_scale)[k] = static_cast<const Sum*>(p.scale)[k] * Sum(gain / p.root);
  }
}

// Whether an output position along one dimension reads `pixel` by this tap.
__device__ __forceinline__ bool reads(int pixel, int tap, const Geometry& g, int dim) {
  const int at = pixel + g.padding[dim] - tap * g.dilation[dim];
  return at >= 0 && at % g.stride[dim] == 0 && at / g.stride[dim] < g.out[dim];
}

// Adds one pixel of one channel, summed over examples begin, begin + step, ... below `end`, to the taps that read it.
template <typename T, typename Sum>
__device__ __forceinline__ void add_pixel(const PatchMean& p, int64_t channel, int pixel, int64_t begin, int64_t end,
                                          int64_t step, int first_tap, Sum (&sums)[kPatchTaps]) {
  const Geometry& g = p.geometry;
  const int x = pixel % g.in[2], y = pixel / g.in[2] % g.in[1], z = pixel / g.in[2] / g.in[1];
  const T* from = static_cast<const T*>(p.x.data) + channel * p.x.channel + z * p.x.space[0] + y * p.x.space[1] +
                  x * p.x.space[2];
  Sum total = 0;
#pragma unroll 2
  for (int64_t i = begin; i < end; i += step) total += to_float(from[i * p.x.example]);
#pragma unroll
  for (int k = 0; k < kPatchTaps; ++k) {
    const int tap = first_tap + k, kx = tap % g.kernel[2], ky = tap / g.kernel[2] % g.kernel[1];
    const int kz = tap / g.kernel[2] / g.kernel[1];
    if (kz < g.kernel[0] && reads(x, kx, g, 2) && reads(y, ky, g, 1) && reads(z, kz, g, 0)) sums[k] += total;
  }
}

// What a block owns, from its number: the tile of taps goes fastest, then the split, then the channels.
struct PatchBlock {
  int first_tap;
  int split;
  int64_t channels;
  int64_t begin, end;  // examples

  __device__ __forceinline__ explicit PatchBlock(const PatchMean& p) {
    const int tiles = (p.geometry.taps() + kPatchTaps - 1) / kPatchTaps, block = int(blockIdx.x);
    first_tap = block % tiles * kPatchTaps, split = block / tiles % p.splits, channels = block / tiles / p.splits;
    const int64_t each = (p.geometry.n + p.splits - 1) / p.splits;
    begin = split * each, end = begin + each < p.geometry.n ? begin + each : p.geometry.n;
  }
};

// Serves dense pixels. Where an image has fewer pixels than the block has threads, `parts` threads share one.
template <typename T>
__global__ void __launch_bounds__(kCorrectionThreads) patch_rows_kernel(PatchMean p) {
  using Sum = typename SumOf<T>::Type;
  ENGM_SHARED(Sum, scratch);  // [kPatchTaps, warps]
  const PatchBlock own(p);
  const int pixels = int(p.geometry.pixels()), parts = pixels < kCorrectionThreads ? kCorrectionThreads / pixels : 1;
  Sum sums[kPatchTaps] = {};
  for (int k = threadIdx.x; k < pixels * parts; k += kCorrectionThreads)
    add_pixel<T>(p, own.channels, k % pixels, own.begin + k / pixels, own.end, parts, own.first_tap, sums);
#pragma unroll
  for (int k = 0; k < kPatchTaps; ++k) {
    const Sum total = block_sum<kCorrectionThreads>(sums[k], scratch + k * kPatchWarps);
    if (threadIdx.x == 0 && own.first_tap + k < p.geometry.taps())
      static_cast<Sum*>(p.sums)[(own.split * p.channels + own.channels) * p.geometry.taps() + own.first_tap + k] =
          total * Sum(p.share);
  }
}

// Serves dense channels.
template <typename T>
__global__ void __launch_bounds__(kCorrectionThreads) patch_columns_kernel(PatchMean p) {
  using Sum = typename SumOf<T>::Type;
  ENGM_SHARED(Sum, shared);  // [kPatchTaps, warps, 32]
  const PatchBlock own(p);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int pixels = int(p.geometry.pixels()), parts = pixels < kPatchWarps ? kPatchWarps / pixels : 1;
  const int64_t channel = own.channels * 32 + lane;
  Sum sums[kPatchTaps] = {};
  if (channel < p.channels)
    for (int k = warp; k < pixels * parts; k += kPatchWarps)
      add_pixel<T>(p, channel, k % pixels, own.begin + k / pixels, own.end, parts, own.first_tap, sums);
#pragma unroll
  for (int k = 0; k < kPatchTaps; ++k) shared[(k * kPatchWarps + warp) * 32 + lane] = sums[k];
  __syncthreads();
  for (int k = warp; k < kPatchTaps; k += kPatchWarps) {
    if (channel >= p.channels || own.first_tap + k >= p.geometry.taps()) continue;
    Sum total = 0;
#pragma unroll
    for (int w = 0; w < kPatchWarps; ++w) total += shared[(k * kPatchWarps + w) * 32 + lane];
    static_cast<Sum*>(p.sums)[(own.split * p.channels + channel) * p.geometry.taps() + own.first_tap + k] =
        total * Sum(p.share);
  }
}

}  // namespace engm::cuda
