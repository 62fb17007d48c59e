// scale[i, c] = Σ_s gy (x - mean) rstd      shift[i, c] = Σ_s gy      norm_sq = Σ_c scale², Σ_c shift²
//
// x and gy are [n, C, S] in either order of memory; mean and rstd broadcast to them. x - mean is formed before the
// product, so that nothing cancels. A block owns an example, or where examples are few a part of it; every thread has
// four accesses of 16 bytes to each operand under way, or eight of one element where these are not aligned.
//   Positions dense: a part is a stretch of channels. `lanes` neighbouring threads own a row of positions, or as many
//     rows as they have accesses under way where a row takes less than one access of each thread.
//   Channels dense: a part is a stretch of positions. `lanes` threads lie along channels, the rest along positions, and
//     their sums are then added in order.
//   The block of a whole example adds its squares; else a second kernel adds the parts and the squares. Every run gives
//     the same bits.
// The bytes bound it: x and gy are read once, 2·n·C·S elements. On an H200 at n = 128 a copy of the same bytes takes
// 16 µs for [128, 64, 1024] in fp32 and 8 in bf16, where two kernels that had one access under way took 33 and 30.
#pragma once

#include "affine_norm.h"
#include "pack.cuh"
#include "reduce.cuh"

namespace engm::cuda {

constexpr int kAffineThreads = 512, kAffineWarps = kAffineThreads / 32, kAffineFinishThreads = 256;

// Over what mean and rstd vary, as far as a kernel makes use of it.
enum class Varying { kOverChannels, kOverPositions, kOverAll };

struct AffineLaunch {
  AffineNorm p;
  int64_t in_part;  // channels of a part, or positions
  int lanes;        // threads along the dense dimension; for rows a power of two up to 32
  bool along;       // rows: a thread's accesses under way belong to one row, not to a row each
};

// How many accesses to an operand a thread has under way.
template <int kPack, Varying kVarying>
constexpr int kInFlight = kPack == 1 && kVarying == Varying::kOverChannels ? 8 : 4;

__device__ __forceinline__ int at_most_an_int(int64_t size) { return int(size < INT32_MAX ? size : INT32_MAX); }

// Mean or rstd of an element, 0 where there is none.
template <typename Sum>
__device__ __forceinline__ Sum statistic_at(const AffineOperand& t, int64_t i, int64_t c, int64_t s) {
  return t.data ? static_cast<const Sum*>(t.data)[i * t.step[0] + c * t.step[1] + s * t.step[2]] : Sum(0);
}

// Which example, and which stretch of `size` channels or positions of it, a block owns.
struct AffineBlock {
  int64_t i, part, begin, end;

  __device__ __forceinline__ AffineBlock(const AffineLaunch& launched, int64_t size) {
    const unsigned parts = unsigned(launched.p.parts_count);
    i = blockIdx.x / parts, part = blockIdx.x % parts;
    begin = part * launched.in_part, end = begin + launched.in_part < size ? begin + launched.in_part : size;
  }
};

// Writes the example's norms, from every thread's squares. scratch: [2, warps].
template <int kThreads, typename Sum>
__device__ __forceinline__ void write_norm_sq(const AffineNorm& p, int64_t i, const double (&squares)[2],
                                              double* scratch) {
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const double total = block_sum<kThreads>(squares[which], scratch + which * (kThreads / 32));
    if (threadIdx.x == 0) static_cast<Sum*>(p.norm_sq)[which * p.n + i] = Sum(total);
  }
}

// Serves dense positions.
template <typename T, int kPack, Varying kVarying>
__global__ void __launch_bounds__(kAffineThreads, 1) affine_rows_kernel(AffineLaunch launched) {
  using Sum = typename SumOf<T>::Type;
  constexpr int kLoads = kInFlight<kPack, kVarying>;
  static_assert(kVarying == Varying::kOverChannels || kPack == 1);
  ENGM_SHARED(double, scratch);  // [2, warps]
  const AffineNorm& p = launched.p;
  const AffineBlock own(launched, p.channels);
  const int lanes = launched.lanes, lane = int(threadIdx.x) & (lanes - 1), group = int(threadIdx.x) / lanes;
  // From one of a thread's accesses to the next: so many rows, or so many positions.
  const int row_step = launched.along ? 0 : kAffineThreads / lanes, step = launched.along ? lanes * kPack : 0;
  const int rows = launched.along ? 1 : kLoads;
  const int64_t x_step = row_step * p.x.step[1] + step, gy_step = row_step * p.gy.step[1] + step;
  double squares[2] = {};
  for (int64_t first = own.begin; first < own.end; first += kAffineThreads / lanes * rows) {
    const int64_t c = first + group;
    const int rows_left = at_most_an_int(own.end - c);
    const T* x = static_cast<const T*>(p.x.data) + own.i * p.x.step[0] + c * p.x.step[1];
    const T* gy = static_cast<const T*>(p.gy.data) + own.i * p.gy.step[0] + c * p.gy.step[1];
    Sum scale[kLoads] = {}, shift[kLoads] = {}, mean[kLoads] = {}, rstd[kLoads] = {};
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (kVarying == Varying::kOverAll || k * row_step >= rows_left) continue;
      mean[k] = statistic_at<Sum>(p.mean, own.i, c + k * row_step, 0);
      rstd[k] = statistic_at<Sum>(p.rstd, own.i, c + k * row_step, 0);
    }
    for (int64_t s = lane * kPack; s < p.positions && rows_left > 0; s += lanes * kPack * (kLoads / rows)) {
      const int left = at_most_an_int(p.positions - s);
      Pack<T, kPack> xs[kLoads], gys[kLoads];
      const T *from_x = x + s, *from_gy = gy + s;
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        const bool there = k * row_step < rows_left && k * step < left;
        from_x += k > 0 && there ? x_step : 0, from_gy += k > 0 && there ? gy_step : 0;  // those behind are not there
        xs[k] = load_pack_or_zero<T, kPack>(from_x, there), gys[k] = load_pack_or_zero<T, kPack>(from_gy, there);
        if (kVarying != Varying::kOverAll || !there) continue;
        mean[k] = statistic_at<Sum>(p.mean, own.i, c + k * row_step, s + k * step);
        rstd[k] = statistic_at<Sum>(p.rstd, own.i, c + k * row_step, s + k * step);
      }
#pragma unroll
      for (int k = 0; k < kLoads; ++k)
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          const Sum g = to_float(gys[k].at[e]), centred = to_float(xs[k].at[e]) - mean[k];
          scale[k] += g * (kVarying == Varying::kOverAll ? centred * rstd[k] : centred);
          shift[k] += g;
        }
    }
    if (launched.along)
#pragma unroll
      for (int k = 1; k < kLoads; ++k) scale[0] += scale[k], shift[0] += shift[k];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      if (k >= rows) break;
      for (int mask = lanes / 2; mask > 0; mask /= 2) {
        scale[k] += shuffle_xor(scale[k], mask);
        shift[k] += shuffle_xor(shift[k], mask);
      }
      if (lane != 0 || k * row_step >= rows_left) continue;
      const Sum total[2] = {kVarying == Varying::kOverAll ? scale[k] : scale[k] * rstd[k], shift[k]};
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        static_cast<Sum*>(p.grads[which])[own.i * p.channels + c + k * row_step] = total[which];
        squares[which] += double(total[which]) * total[which];
      }
    }
  }
  if (p.parts_count == 1) write_norm_sq<kAffineThreads, Sum>(p, own.i, squares, scratch);
}

// Serves dense channels. A block takes its slabs of lanes · kPack channels in turn.
template <typename T, int kPack, Varying kVarying>
__global__ void __launch_bounds__(kAffineThreads, 1) affine_columns_kernel(AffineLaunch launched) {
  using Sum = typename SumOf<T>::Type;
  constexpr int kLoads = kInFlight<kPack, kVarying>;
  ENGM_SHARED(double, scratch);                                        // [2, warps]
  Sum* const shared = reinterpret_cast<Sum*>(scratch + 2 * kAffineWarps);  // [2, rows, lanes · kPack]
  const AffineNorm& p = launched.p;
  const AffineBlock own(launched, p.positions);
  const int lanes = launched.lanes, rows = kAffineThreads / lanes, width = lanes * kPack;
  const int row = int(threadIdx.x) / lanes, lane = int(threadIdx.x) - row * lanes;
  double squares[2] = {};
  for (int64_t slab = 0; slab < p.channels; slab += width) {
    const int64_t c = slab + lane * kPack;
    Sum scale[kPack] = {}, shift[kPack] = {};
    if (row < rows && c < p.channels) {
      const T* x = static_cast<const T*>(p.x.data) + own.i * p.x.step[0] + c;
      const T* gy = static_cast<const T*>(p.gy.data) + own.i * p.gy.step[0] + c;
      Sum means[kPack];
      if (kVarying == Varying::kOverChannels)
#pragma unroll
        for (int e = 0; e < kPack; ++e) means[e] = statistic_at<Sum>(p.mean, own.i, c + e, 0);
      for (int64_t first = own.begin + row; first < own.end; first += rows * kLoads) {
        Pack<T, kPack> xs[kLoads], gys[kLoads];
        Sum mean[kLoads], rstd[kLoads];
        const int left = at_most_an_int(own.end - first);
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
          const bool there = k * rows < left;
          const int64_t s = there ? first + k * rows : first;
          xs[k] = load_pack_or_zero<T, kPack>(x + s * p.x.step[2], there);
          gys[k] = load_pack_or_zero<T, kPack>(gy + s * p.gy.step[2], there);
          if (kVarying == Varying::kOverChannels) continue;
          static_assert(kVarying != Varying::kOverAll || kPack == 1);
          mean[k] = statistic_at<Sum>(p.mean, own.i, c, s);
          rstd[k] = statistic_at<Sum>(p.rstd, own.i, c, s);
        }
#pragma unroll
        for (int k = 0; k < kLoads; ++k)
#pragma unroll
          for (int e = 0; e < kPack; ++e) {
            const Sum g = to_float(gys[k].at[e]), v = to_float(xs[k].at[e]);
            scale[e] += g * (kVarying == Varying::kOverChannels ? v - means[e] : (v - mean[k]) * rstd[k]);
            shift[e] += g;
          }
      }
    }
    __syncthreads();  // the slab before has been read
    if (row < rows)
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        shared[row * width + lane * kPack + e] = scale[e];
        shared[(rows + row) * width + lane * kPack + e] = shift[e];
      }
    __syncthreads();
    for (int column = threadIdx.x; column < 2 * width; column += kAffineThreads) {
      const int which = column < width ? 0 : 1;
      const int64_t channel = slab + column - which * width;
      if (channel >= p.channels) continue;
      Sum total = 0;
#pragma unroll 8
      for (int r = 0; r < rows; ++r) total += shared[(which * rows + r) * width + column - which * width];
      if (kVarying == Varying::kOverChannels && which == 0) total *= statistic_at<Sum>(p.rstd, own.i, channel, 0);
      Sum* out = p.parts ? static_cast<Sum*>(p.parts) + (own.part * 2 + which) * p.n * p.channels
                         : static_cast<Sum*>(p.grads[which]);
      out[own.i * p.channels + channel] = total;
      const double square = double(total) * total;
      squares[0] += which == 0 ? square : 0, squares[1] += which == 0 ? 0 : square;
    }
  }
  if (p.parts_count == 1) write_norm_sq<kAffineThreads, Sum>(p, own.i, squares, scratch);
}

// Adds the parts, where they are of positions, and the squares. A block owns an example.
template <typename Sum>
__global__ void __launch_bounds__(kAffineFinishThreads) affine_finish_kernel(AffineNorm p) {
  ENGM_SHARED(double, scratch);  // [2, warps]
  const int64_t i = blockIdx.x;
  double squares[2] = {};
  for (int64_t c = threadIdx.x; c < p.channels; c += kAffineFinishThreads)
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      Sum* out = static_cast<Sum*>(p.grads[which]) + i * p.channels + c;
      if (p.parts) {
        const Sum* parts = static_cast<const Sum*>(p.parts) + (which * p.n + i) * p.channels + c;
        Sum total = 0;
#pragma unroll 4
        for (int64_t part = 0; part < p.parts_count; ++part) total += parts[part * 2 * p.n * p.channels];
        *out = total;
      }
      squares[which] += double(*out) * *out;
    }
  write_norm_sq<kAffineFinishThreads, Sum>(p, i, squares, scratch);
}

}  // namespace engm::cuda
