// The problem and the plan of gram_norm.cuh, and the problem of rank_one.cuh, in plain numbers.
#pragma once

#include "problem.h"

namespace engm::cuda {

struct GramNorm {
  Operand x;   // [n, groups·channels, in]
  Operand gy;  // [n, groups·rows, out]
  Geometry geometry;
  void* partial;        // [n, what plan_gram_norm returned], of the sums' type: float, for kFloat64 double
  void* out;            // [n] squared norms, of the sums' type
  uint8_t* reliable;    // [n] 0 where the sum cancelled so far that the direct form has to be taken
  double cancellation;  // the launcher sets it

  // The plan.
  int band[3], bands[3];     // output positions of one band, and bands along each axis
  int taps[3], chunks[3];    // kernel taps whose pixels are on chip at once, and chunks of them along each axis
  bool apart[3];             // taps and positions share no pixels, and each (position, tap) has a row of its own
  int band_count, tiles;     // bands in all, pairs of them
  int tile_rows;             // rows of one operand on chip, a multiple of 16
  int log_steps;             // a stage of the pipeline holds 2^log_steps steps of the matrix instruction
  int gram_pitch, q_pitch;   // row pitches of P and Q, in elements
  int threads;
  int q_at, offset_at, table_at, side_at, scratch_at;  // in shared memory, bytes
  int64_t shared;            // bytes
  bool x_vectors, gy_vectors;  // channel stride 1, everything else 16-byte aligned; the launcher sets them
};

// Fills the plan in and returns the elements of `partial` that one example needs. Takes any problem with at least one
// position and one tap; 0 if a pair of single positions with one tap does not fit into `shared_limit` bytes (no GPU has
// that little), or if the launch would need more than 2^31 - 1 blocks (T far beyond what the Gram form is for).
int64_t plan_gram_norm(GramNorm& problem, Precision precision, int64_t shared_limit);

// Enqueues two kernels on the given stream; returns the first launch error, 0 if both are queued.
int launch_gram_norm(const GramNorm& problem, Precision precision, void* stream);

// out[i] = ‖a_i‖²‖b_i‖², the gradient of a linear layer at a single position. Operands are not rounded: kTf32 is as
// kFloat32 here.
struct RankOne {
  Operand a;  // [n, channels]; spatial strides are not read
  Operand b;  // [n, rows]
  int64_t n, channels, rows;
  void* out;  // [n], double for kFloat64, else float
  bool a_vectors, b_vectors;  // the launcher sets them
};

int launch_rank_one(const RankOne& problem, Precision precision, void* stream);

}  // namespace engm::cuda
