// The problem of gram_contraction.cuh in plain numbers: two Gram matrices an example, multiplied and summed.
#pragma once

#include <cstdint>

#include "problem.h"

namespace engm::cuda {

struct GramContraction {
  const void* p;      // [n, T, pitch], 16-byte aligned, of the sums' type: float, for kFloat64 double
  const void* q;      // the same; what lies behind column T of a row is not read as a number
  void* out;          // [n] squared norms, of the sums' type
  uint8_t* reliable;  // [n] 0 where the sum cancelled so far that the direct form has to be taken
  int64_t n;
  int positions;        // T
  int pitch;            // gram_pitch()
  double cancellation;  // the launcher sets it
};

// The most positions that an example may have, so that its pairs are counted in 32 bits.
constexpr int kMostContracted = 1 << 15;

// The distance between rows of a Gram matrix in elements, for 16-byte loads from every row.
constexpr int64_t gram_pitch(int64_t positions, int64_t element) {
  const int64_t pack = 16 / element;
  return (positions + pack - 1) / pack * pack;
}

// Enqueues one kernel on the given stream; returns the launch's error, 0 if it is queued.
int launch_gram_contraction(const GramContraction& problem, Precision precision, void* stream);

}  // namespace engm::cuda
