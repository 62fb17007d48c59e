// The problem of weighted_gemm.cuh in plain numbers: the weighted sum of a linear layer's gradients as one product.
#pragma once

#include <cstdint>

#include "problem.h"

namespace engm::cuda {

struct WeightedGemm {
  const void* a;        // [rows, p], the precision's element
  const void* b;        // [rows, d]
  const void* weights;  // [rows / positions], float, double for kFloat64; as are parts and out
  void* parts;          // [splits, d, p], or null where splits is 1
  void* out;            // [d, p]
  int64_t a_pitch, b_pitch;
  int32_t rows, positions, p, d;
  int32_t splits;  // weighted_gemm_splits()
  bool a_aligned, b_aligned;  // pointer, pitch and width allow accesses of 16 bytes
};

// How many stretches the rows are cut into, so that few tiles fill the machine too.
int32_t weighted_gemm_splits(int64_t rows, int64_t p, int64_t d, Precision precision);

// Enqueues on the given cudaStream_t; returns the launch's cudaError_t, 0 if it is queued.
int launch_weighted_gemm(const WeightedGemm& problem, Precision precision, void* stream);

}  // namespace engm::cuda
