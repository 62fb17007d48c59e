// The problem of sum_partials.cuh in plain numbers: the blocks' partial sums of each example, added in order.
#pragma once

#include <cstdint>

namespace engm::cuda {

struct SumPartials {
  const void* partial;  // [n, count], float or double
  const uint8_t* done;  // [n], examples whose `out` stays as it is, or null where there are none
  void* out;            // [n], the same type
  int64_t n;
  int64_t count;
  bool is_double;
};

// Enqueues on the given stream; returns the launch's error, 0 if it is queued.
int launch_sum_partials(const SumPartials& problem, void* stream);

}  // namespace engm::cuda
