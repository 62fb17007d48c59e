// The problems of correction.cuh in plain numbers: what a batch norm takes off the gradients of the layer before it.
#pragma once

#include <cstdint>

#include "element.h"
#include "problem.h"

namespace engm::cuda {

// normalised[i, c, t] = (outputs[i, c, t] - mean[c]) rstd[c] share
// gained_shift = gain shift, gained_scale = gain scale share
struct CorrectionFactors {
  const void* outputs;     // [n, d, T] or, with channels_last, [n, T, d], Element; d T is less than kMostOfExample
  void* normalised;        // the same
  // Sums are float, or double for kFloat64.
  const void *mean, *rstd, *gain;    // [d]
  const void *shift, *scale;         // [n, d]
  void *gained_shift, *gained_scale; // [n, d]
  int64_t n, channels, positions;
  double share;  // 1 / sqrt(n T)
  Element element;
  bool channels_last;
  bool aligned;  // runs of outputs and normalised, and with channels_last mean and rstd, allow accesses of 16 bytes
};

constexpr int64_t kMostOfExample = INT32_MAX - (1 << 13);  // numbers of elements, and of threads beyond them, are int

// sums[c, tap] = Σ over output positions of what the tap reads of totals, times `share`
struct PatchMean {
  const void* totals;  // [C, z, y, x] or, with channels_last, [z, y, x, C]: x summed over examples, of the sums' type
  Geometry geometry;   // in, out, kernel, stride, padding, dilation
  int64_t channels;
  void* sums;  // [C, taps], of the sums' type
  double share;
  int team;    // threads that own a tap of a channel; filled in by the launcher
  bool is_double;
  bool channels_last;
};

// Both enqueue on the given cudaStream_t and return the launch's cudaError_t, 0 if it is queued.
int launch_correction_factors(const CorrectionFactors& problem, void* stream);
int launch_patch_mean(PatchMean problem, void* stream);

}  // namespace engm::cuda
