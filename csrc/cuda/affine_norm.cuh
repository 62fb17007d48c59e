// scale[i, c] = Σ_s gy (x - mean) rstd      shift[i, c] = Σ_s gy      norm_sq = Σ_c scale², Σ_c shift²
//
// x and gy are [n, C, S] in either order of memory; mean and rstd broadcast to them. x - mean is formed before the
// product, so that nothing cancels. The kernels read x and gy once, 2·n·C·S elements, by 16 bytes where these are
// aligned; everything else is small.
//   Positions dense: `lanes` neighbouring threads own one (example, channel) and add along its positions.
//   Channels dense: a block owns an example's slab of channels over one part of its positions; `lanes` threads lie
//     along channels and the rest along positions, whose sums are then added in order.
//   A second kernel adds the parts and the squares; a block owns an example. Every run gives the same bits.
#pragma once

#include "affine_norm.h"
#include "pack.cuh"
#include "reduce.cuh"

namespace engm::cuda {

constexpr int kAffineThreads = 256, kAffineFinishThreads = 128;

struct AffineLaunch {
  AffineNorm p;
  int lanes;  // threads along the dense dimension, a power of two
};

template <typename Sum>
__device__ __forceinline__ const Sum* statistic_at(const AffineOperand& t, int64_t i, int64_t c) {
  return t.data ? static_cast<const Sum*>(t.data) + i * t.step[0] + c * t.step[1] : nullptr;
}

// Serves dense positions. A block has kAffineThreads / lanes rows, and `lanes` is a warp at most.
template <typename T, int kPack>
__global__ void __launch_bounds__(kAffineThreads, 2) affine_rows_kernel(AffineLaunch launched) {
  using Sum = typename SumOf<T>::Type;
  const AffineNorm& p = launched.p;
  const int lanes = launched.lanes, lane = int(threadIdx.x) % lanes;
  const int64_t row = int64_t(blockIdx.x) * (kAffineThreads / lanes) + int(threadIdx.x) / lanes;
  const bool owns = row < p.n * p.channels;
  Sum scale = 0, shift = 0;
  if (owns) {
    const int64_t i = row / p.channels, c = row % p.channels;
    const T* x = static_cast<const T*>(p.x.data) + i * p.x.step[0] + c * p.x.step[1];
    const T* gy = static_cast<const T*>(p.gy.data) + i * p.gy.step[0] + c * p.gy.step[1];
    const Sum *means = statistic_at<Sum>(p.mean, i, c), *rstds = statistic_at<Sum>(p.rstd, i, c);
    const int64_t mean_step = p.mean.step[2], rstd_step = p.rstd.step[2];
    const bool one_mean = !means || mean_step == 0, one_rstd = rstd_step == 0;
    const Sum row_mean = means ? *means : Sum(0), row_rstd = *rstds;
#pragma unroll 4
    for (int64_t s = int64_t(lane) * kPack; s < p.positions; s += int64_t(lanes) * kPack) {
      const Pack<T, kPack> xs = load_pack<T, kPack>(x + s), gys = load_pack<T, kPack>(gy + s);
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        const Sum mean = one_mean ? row_mean : means[(s + k) * mean_step];
        const Sum rstd = one_rstd ? row_rstd : rstds[(s + k) * rstd_step];
        const Sum g = to_float(gys.at[k]);
        scale += g * ((to_float(xs.at[k]) - mean) * rstd);
        shift += g;
      }
    }
  }
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    scale += shuffle_xor(scale, mask);
    shift += shuffle_xor(shift, mask);
  }
  if (!owns || lane != 0) return;
  static_cast<Sum*>(p.grads[0])[row] = scale;
  static_cast<Sum*>(p.grads[1])[row] = shift;
}

// Holds mean or rstd of a pack of channels, and loads it again only where it varies over positions.
template <typename Sum, int kPack>
struct Statistic {
  const Sum* data;
  int64_t position_step, channel_step;
  Sum at[kPack];

  __device__ __forceinline__ Statistic(const AffineOperand& t, int64_t i, int64_t c)
      : data(statistic_at<Sum>(t, i, c)), position_step(t.step[2]), channel_step(t.step[1]) {
#pragma unroll
    for (int k = 0; k < kPack; ++k) at[k] = data ? data[k * channel_step] : Sum(0);
  }
  __device__ __forceinline__ void move_to(int64_t s) {
    if (!data || position_step == 0) return;
    const Sum* here = data + s * position_step;
    const Sum first = *here;
#pragma unroll
    for (int k = 0; k < kPack; ++k) at[k] = channel_step == 0 ? first : here[k * channel_step];
  }
};

// Serves dense channels. A block owns (example, part, slab), the slab going fastest.
template <typename T, int kPack>
__global__ void __launch_bounds__(kAffineThreads, 2) affine_columns_kernel(AffineLaunch launched) {
  using Sum = typename SumOf<T>::Type;
  ENGM_SHARED(Sum, shared);  // [2, rows, lanes · kPack]
  const AffineNorm& p = launched.p;
  const int lanes = launched.lanes, rows = kAffineThreads / lanes, width = lanes * kPack;
  const int lane = int(threadIdx.x) % lanes, row = int(threadIdx.x) / lanes;
  const int64_t slabs = (p.channels + width - 1) / width, block = blockIdx.x;
  const int64_t slab = block % slabs, part = block / slabs % p.parts_count, i = block / slabs / p.parts_count;
  const int64_t in_part = (p.positions + p.parts_count - 1) / p.parts_count, begin = part * in_part;
  const int64_t end = begin + in_part < p.positions ? begin + in_part : p.positions;
  const int64_t c = slab * width + lane * kPack;

  Sum scale[kPack] = {}, shift[kPack] = {};
  if (c < p.channels) {
    const T* x = static_cast<const T*>(p.x.data) + i * p.x.step[0] + c;
    const T* gy = static_cast<const T*>(p.gy.data) + i * p.gy.step[0] + c;
    Statistic<Sum, kPack> mean(p.mean, i, c), rstd(p.rstd, i, c);
#pragma unroll 4
    for (int64_t s = begin + row; s < end; s += rows) {
      const Pack<T, kPack> xs = load_pack<T, kPack>(x + s * p.x.step[2]);
      const Pack<T, kPack> gys = load_pack<T, kPack>(gy + s * p.gy.step[2]);
      mean.move_to(s), rstd.move_to(s);
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        const Sum g = to_float(gys.at[k]);
        scale[k] += g * ((to_float(xs.at[k]) - mean.at[k]) * rstd.at[k]);
        shift[k] += g;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    shared[row * width + lane * kPack + k] = scale[k];
    shared[(rows + row) * width + lane * kPack + k] = shift[k];
  }
  __syncthreads();
  for (int column = threadIdx.x; column < 2 * width; column += kAffineThreads) {
    const int which = column / width, channel = column % width;
    if (slab * width + channel >= p.channels) continue;
    Sum total = 0;
    for (int r = 0; r < rows; ++r) total += shared[(which * rows + r) * width + channel];
    Sum* out = p.parts ? static_cast<Sum*>(p.parts) + (part * 2 + which) * p.n * p.channels
                       : static_cast<Sum*>(p.grads[which]);
    out[i * p.channels + slab * width + channel] = total;
  }
}

// Adds the parts, where there are any, and the squares. A block owns an example.
template <typename Sum>
__global__ void __launch_bounds__(kAffineFinishThreads) affine_finish_kernel(AffineNorm p) {
  ENGM_SHARED(double, scratch);
  const int64_t i = blockIdx.x;
  for (int which = 0; which < 2; ++which) {
    Sum* grads = static_cast<Sum*>(p.grads[which]) + i * p.channels;
    const Sum* parts = static_cast<const Sum*>(p.parts) + which * p.n * p.channels + i * p.channels;
    double squares = 0;
    for (int64_t c = threadIdx.x; c < p.channels; c += kAffineFinishThreads) {
      Sum total = 0;
      if (p.parts) {
        for (int64_t part = 0; part < p.parts_count; ++part) total += parts[part * 2 * p.n * p.channels + c];
        grads[c] = total;
      } else {
        total = grads[c];
      }
      squares += double(total) * total;
    }
    squares = block_sum<kAffineFinishThreads>(squares, scratch + which * (kAffineFinishThreads / 32));
    if (threadIdx.x == 0) static_cast<Sum*>(p.norm_sq)[which * p.n + i] = Sum(squares);
  }
}

}  // namespace engm::cuda
