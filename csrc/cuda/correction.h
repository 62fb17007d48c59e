// The problems of correction.cuh in plain numbers: what a batch norm takes off the gradients of the layer before it.
#pragma once

#include <cstdint>

#include "element.h"
#include "problem.h"

namespace engm::cuda {

// normalised[i, c, t] = (outputs[i, c, t] - mean[c]) rstd[c] / root, gained_shift = gain shift, gained_scale = gain scale / root
struct CorrectionFactors {
  const void* outputs;     // [n, d, T] or, with channels_last, [n, T, d], Element
  void* normalised;        // the same
  // Sums are float, or double for kFloat64.
  const void *mean, *rstd, *gain;    // [d]
  const void *shift, *scale;         // [n, d]
  void *gained_shift, *gained_scale; // [n, d]
  int64_t n, channels, positions;
  double root;
  int multiprocessors;  // of the device
  Element element;
  bool channels_last;
};

// sums[split, c, tap] = Σ over the examples of a split, and over output positions, of what the tap reads, times `share`
struct PatchMean {
  Operand x;  // [n, C, z, y, x], Element
  Geometry geometry;  // n, in, out, kernel, stride, padding, dilation
  int64_t channels;
  int splits;
  void* sums;  // [splits, C, taps], of the sums' type
  double share;
  Element element;
};

// How many splits of the examples fill the device, given its multiprocessors.
int patch_splits(const PatchMean& problem, int multiprocessors);

// Both enqueue on the given cudaStream_t and return the launch's cudaError_t, 0 if it is queued.
int launch_correction_factors(const CorrectionFactors& problem, void* stream);
int launch_patch_mean(const PatchMean& problem, void* stream);

}  // namespace engm::cuda
