// ‖G_i − C_i‖² = ‖G_i‖² − 2 <G_i, C_i> + ‖C_i‖²      C_i[o] = shift[i, o] M + scale[i, o] K_o
//
// What a batch norm takes off the gradients G_i[o] = Σ_t gy[i, o, t] patch[i, t] of the layer before it, for norms
// whose form does not hold G_i. With the layer's response to other weights, y[i, o, t] = <K_o, patch[i, t]> and m[i, t]
// = <M, patch[i, t]>, which a convolution gives,
//
//   <G_i, C_i> = Σ_{o,t} gy[i, o, t] (scale[i, o] y[i, o, t] + shift[i, o] m[i, t])
//   ‖C_i‖² = Σ_o scale[i, o]² ‖K_o‖² + 2 scale[i, o] shift[i, o] <M, K_o> + shift[i, o]² ‖M‖²
//
// correction_filters_kernel writes K and M as the weights of that convolution, one row a block, and the three moments.
// expanded_correction_kernel owns an example by a block: it reads gy and the responses once, 2·n·d·T elements. Where
// the terms cancel, the norm is left as it is and marked, for the direct form. Every run gives the same bits.
#pragma once

#include <cmath>

#include "expanded_correction.h"
#include "pack.cuh"
#include "reduce.cuh"

namespace engm::cuda {

constexpr int kFilterThreads = 256, kExpandedThreads = 512, kExpandedWarps = kExpandedThreads / 32;

// How many times smaller than its terms a norm may be: beyond that their rounding would show.
template <typename T>
constexpr double kCorrectionCancellation = 16;
template <>
constexpr double kCorrectionCancellation<double> = 4096;

template <typename T>
__global__ void __launch_bounds__(kFilterThreads) correction_filters_kernel(CorrectionFilters p) {
  using Sum = typename SumOf<T>::Type;
  ENGM_SHARED(Sum, scratch);  // [2, warps]
  const int o = int(blockIdx.x);
  const Sum* const mean = static_cast<const Sum*>(p.patch_mean);
  const Sum* const row = o < p.d ? static_cast<const Sum*>(p.correlation) + o * p.length : mean;
  T* const filter = static_cast<T*>(p.filters) + o * p.length;
  Sum own = 0, with_mean = 0;
#pragma unroll 4
  for (int64_t k = threadIdx.x; k < p.length; k += kFilterThreads) {
    const Sum v = o <= p.d ? row[k] : Sum(0);
    from_float(v, filter[k]);
    own += v * v, with_mean += v * mean[k];
  }
  own = block_sum<kFilterThreads>(own, scratch);
  with_mean = block_sum<kFilterThreads>(with_mean, scratch + kFilterThreads / 32);
  if (threadIdx.x != 0 || o > p.d) return;
  Sum* const moments = static_cast<Sum*>(p.moments);
  moments[o < p.d ? o : 2 * p.d] = own;
  if (o < p.d) moments[p.d + o] = with_mean;
}

template <typename T>
__global__ void __launch_bounds__(kExpandedThreads) expanded_correction_kernel(ExpandedCorrection p) {
  using Sum = typename SumOf<T>::Type;
  ENGM_SHARED(Sum, scratch);  // [2, warps]
  const int64_t i = blockIdx.x;
  const T* const gy = static_cast<const T*>(p.gy) + i * p.d * p.positions;
  const T* const responses = static_cast<const T*>(p.responses) + i * p.rows * p.positions;
  const Sum* const shift = static_cast<const Sum*>(p.shift) + i * p.d;
  const Sum* const scale = static_cast<const Sum*>(p.scale) + i * p.d;
  const Sum* const moments = static_cast<const Sum*>(p.moments);
  // Lanes lie along the dense dimension, rows of which the warps share; where it is short a warp takes several rows.
  const int positions = int(p.positions), inner = p.channels_last ? p.d : positions;
  const int outer = p.channels_last ? positions : p.d, pitch = p.channels_last ? p.rows : positions;
  int lanes = 32;
  while (lanes / 2 >= inner) lanes /= 2;
  const int lane = int(threadIdx.x) % lanes, rows = kExpandedThreads / lanes;
  Sum cross = 0, own = 0;
#pragma unroll 4
  for (int row = int(threadIdx.x) / lanes; row < outer; row += rows)
    for (int k = lane; k < inner; k += lanes) {
      const int o = p.channels_last ? k : row, t = p.channels_last ? row : k;
      const T m = responses[p.channels_last ? t * pitch + p.d : p.d * pitch + t];
      cross +=
          to_float(gy[row * inner + k]) * (scale[o] * to_float(responses[row * pitch + k]) + shift[o] * to_float(m));
    }
  for (int o = threadIdx.x; o < p.d; o += kExpandedThreads)
    own +=
        scale[o] * (scale[o] * moments[o] + 2 * shift[o] * moments[p.d + o]) + shift[o] * shift[o] * moments[2 * p.d];
  cross = block_sum<kExpandedThreads>(cross, scratch);
  own = block_sum<kExpandedThreads>(own, scratch + kExpandedWarps);
  if (threadIdx.x != 0) return;
  Sum* const norm = static_cast<Sum*>(p.norms) + i;
  const Sum corrected = *norm - 2 * cross + own;
  const bool holds = isfinite(corrected) && Sum(kCorrectionCancellation<T>) * corrected > *norm + own;
  if (holds) *norm = corrected;
  p.done[i] = holds;
}

}  // namespace engm::cuda
