// The problem and the plan of the direct form in plain numbers, for gemm_norm and conv_norm alike.
#pragma once

#include "problem.h"

namespace engm::cuda {

struct DirectNorm {
  Operand x;   // [n, groups·channels, in]
  Operand gy;  // [n, groups·rows, out]
  Geometry geometry;
  // A batch-norm correction, all of it or null, contiguous and of the sums' type. What is squared and written is
  // G - shift·patch_mean - scale·correlation.
  const void* shift;        // [n, groups·rows]
  const void* scale;        // [n, groups·rows]
  const void* patch_mean;   // [groups·channels, taps]
  const void* correlation;  // [groups·rows, channels, taps]
  void* grads;              // [n, groups·rows, channels, taps], written where not null
  const uint8_t* done;      // [n], examples to leave alone, or null where there are none
  void* partial;            // [n, tiles] sums of squares, of the sums' type
  int multiprocessors;      // of the device; how many blocks look for examples that are not done
  bool vectors;             // both operands: channel stride 1, everything else 16-byte aligned

  // The plan.
  bool wide;                     // the tile for many channels
  int tile_h, tile_w;            // output positions of one step of the pipeline, a rectangle
  int positions;                 // tile_h·tile_w rounded up to the matrix instruction's depth
  int halo;                      // pixels that the positions of one step need, at most
  int taps_a_tile;               // kernel taps that one block accumulates
  int channel_tiles, row_tiles, tap_tiles;
  int64_t shared;                // bytes
  constexpr int64_t tiles() const { return int64_t(channel_tiles) * row_tiles * tap_tiles * geometry.groups; }
};

// Fills the plan in, or returns false if one step does not fit into `shared_limit` bytes.
bool plan_gemm_norm(DirectNorm& problem, Precision precision, int64_t shared_limit);
bool plan_conv_norm(DirectNorm& problem, Precision precision, int64_t shared_limit);

// Enqueues on the given stream; returns the launch's error, 0 if it is queued. gemm_norm takes kernels of one tap.
int launch_gemm_norm(const DirectNorm& problem, Precision precision, void* stream);
int launch_conv_norm(const DirectNorm& problem, Precision precision, void* stream);

}  // namespace engm::cuda
