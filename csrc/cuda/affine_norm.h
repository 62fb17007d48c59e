// The problem of affine_norm.cuh in plain numbers: scale and shift gradients of a normalisation layer, per example.
#pragma once

#include <cstdint>

#include "element.h"

namespace engm::cuda {

// A tensor [n, C, S] in any order of memory. `step` is in elements along example, channel and position, 0 where the
// tensor broadcasts.
struct AffineOperand {
  const void* data;
  int64_t step[3];
};

struct AffineNorm {
  AffineOperand x, gy;       // Element; one of channel and position has step 1 (or size 1), the same one in both
  AffineOperand mean, rstd;  // float, double for kFloat64; mean.data is null where the mean is 0
  // Sums are float, or double for kFloat64.
  void* parts;               // [parts, 2, n, C] partial sums of stretches of positions, or null where there are none
  void* grads[2];            // [n, C], scale and shift
  void* norm_sq;             // [2, n]
  int64_t n, channels, positions;
  int64_t parts_count;       // affine_parts()
  Element element;
  bool channels_last;        // channels have step 1
  bool aligned;              // x and gy allow accesses of 16 bytes along the dense dimension, whose size is a multiple
};

// How many stretches an example is cut into, of its positions with channels_last, else of its channels, so that few
// examples fill the machine too.
int64_t affine_parts(int64_t n, int64_t channels, int64_t positions, bool channels_last);

// Enqueues on the given cudaStream_t; returns the launch's cudaError_t, 0 if it is queued.
int launch_affine_norm(const AffineNorm& problem, void* stream);

}  // namespace engm::cuda
