// norms[i] = sqrt(max(Σ_l c_l s[l, i], 0))      weights[i] = min(α / norms[i], 1)
//
// s is [layers, n]. Thread i owns example i and adds its layers in order, in double, so that every run gives the same
// bits; the loads of a warp are neighbours. The kernel reads layers·n elements and `layers` factors, and writes 2n. A
// sum that is not finite gives a NaN weight, a norm of 0 gives weight 1.
#pragma once

#include <cmath>

#include "clip_weights.h"
#include "ptx.cuh"

namespace engm::cuda {

constexpr int kClipThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kClipThreads) clip_weights_kernel(ClipWeights p) {
  const int64_t i = int64_t(blockIdx.x) * kClipThreads + threadIdx.x;
  if (i >= p.n) return;
  const T* s = static_cast<const T*>(p.squared_norms) + i;
  double total = 0;
  // The loop is unrolled for loads in flight; the additions stay in order.
#pragma unroll 8
  for (int64_t l = 0; l < p.layers; ++l) total += (p.factors ? p.factors[l] : 1.0) * double(s[l * p.n]);
  const bool finite = isfinite(total);
  const double norm = total < 0 ? (finite ? 0.0 : nan("")) : sqrt(total);
  static_cast<T*>(p.norms)[i] = T(norm);
  static_cast<T*>(p.weights)[i] = !finite ? T(nan("")) : norm <= p.alpha ? T(1) : T(p.alpha / norm);
}

}  // namespace engm::cuda
