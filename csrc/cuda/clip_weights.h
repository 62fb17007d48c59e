// The problem of clip_weights.cuh in plain numbers: norms and weights from the squared norms of all layers.
#pragma once

#include <cstdint>

namespace engm::cuda {

struct ClipWeights {
  const void* squared_norms;  // [layers, n], float or double
  const double* factors;      // [layers], or null where all are 1
  void* norms;                // [n], the type of squared_norms
  void* weights;              // [n]
  int64_t layers;
  int64_t n;
  double alpha;  // may be infinite
  bool is_double;
};

// Enqueues on the given cudaStream_t; returns the launch's cudaError_t, 0 if it is queued.
int launch_clip_weights(const ClipWeights& problem, void* stream);

}  // namespace engm::cuda
