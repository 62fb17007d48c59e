// The problem of weighting.cuh in plain numbers: many tensors of weighted examples in one launch.
#pragma once

#include <cstdint>

#include "element.h"

namespace engm::cuda {

struct WeightedTensor {
  const void* in;       // [n, per_example], dense
  void* out;            // as `in` for scaling; for sums [per_example], float, or double for kFloat64
  int64_t per_example;
  Element element;
  bool aligned;         // both pointers and per_example allow accesses of 16 bytes to each example
};

constexpr int kTensorsAtOnce = 96;  // a kernel's parameters have to fit 4 KB

struct WeightedTensors {
  WeightedTensor tensor[kTensorsAtOnce];
  int32_t first_block[kTensorsAtOnce];  // filled in by the launchers
  const void* weights;                  // [n], double if weights_are_double, else float; null for sums of weight 1
  int64_t n;
  int32_t count;
  bool weights_are_double;  // needed where a tensor is kFloat64
};

// Enqueue on the given cudaStream_t; return the launch's cudaError_t, 0 if it is queued. `all.count` tensors of n rows.
int launch_scale_examples(WeightedTensors& all, void* stream);
int launch_weighted_sums(WeightedTensors& all, void* stream);

}  // namespace engm::cuda
