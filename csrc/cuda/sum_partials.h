// What crosses to sum_partials.cu.
#pragma once

#include <cstdint>

namespace engm::cuda {

struct SumPartials {
  const void* partial;  // [n, count], float or double
  const uint8_t* done;  // [n] or null: examples whose `out` stays
  void* out;            // [n], the same type
  int64_t n;
  int64_t count;
  bool is_double;
};

// Enqueues on the given stream; returns the launch's error, 0 if it is queued.
int launch_sum_partials(const SumPartials& problem, void* stream);

}  // namespace engm::cuda
