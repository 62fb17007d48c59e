// The problem and the plan of the direct form in plain numbers, for gemm_norm and conv_norm alike.
#pragma once

#include "problem.h"

namespace engm::cuda {

// How a block copies an operand into shared memory, by what is known to be side by side in memory (direct_copy.cuh).
enum class Copies : int32_t {
  kElements,  // nothing: single elements
  kRows,      // channels: 16 bytes of one pixel
  kLines,     // pixels of a line: 16 bytes of one channel
};

// The plan of one operand's way through shared memory.
struct Staging {
  Copies copies;
  int rows;         // of a step: pixels, and rows that are none
  int entries;      // of a step, at most: what is copied, rows or pieces
  // Of kLines only.
  static constexpr int kBatch = 4;  // copies that follow each other
  int line_pieces;  // pieces of 16 bytes of a line, at most
  int lanes, shift; // threads side by side that copy pieces side by side, 2^shift
  uint32_t channel; // bytes from one channel of the operand to the next
  int step;         // from one channel of a thread to its next
  int whole;        // channels from which on a thread copies whole batches of a piece
  int batches;      // how many
  int64_t far[kBatch];  // the same in bytes of the operand, once, twice and so on
  int raw_pitch;    // bytes from one channel's raw pieces to the next one's: an odd number of pieces, so that those of 8
                    // channels lie in 8 banks
  int raw_far[kBatch];  // bytes from one channel of a thread to its next, once, twice and so on
};

// Where things lie in a block's shared memory, in bytes.
struct SharedLayout {
  int positions, taps, x_places, gy_places, x_from, gy_from, scratch;  // tables
  int x, gy, x_stage, gy_stage;                                        // rows, of every stage or, of stride 0, of one
  int x_raw, gy_raw, x_raw_stage, gy_raw_stage;                        // raw pieces
  int64_t bytes;
};

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
  int multiprocessors;      // of the device

  // The plan; who copies how is for the binding to say.
  Staging x_staging, gy_staging;
  bool wide;                     // the tile for many channels
  int tile_h, tile_w;            // output positions of one step of the pipeline, a rectangle
  int positions;                 // tile_h·tile_w rounded up to the matrix instruction's depth
  int halo;                      // pixels that the positions of one step need, at most
  int taps_a_tile;               // kernel taps that one block accumulates
  int channel_tiles, row_tiles, tap_tiles;
  int most_entries;              // of what is copied in a step, of x or of gy
  int example_step;              // blocks that share a tile's examples
  SharedLayout layout;
  constexpr int64_t tiles() const { return int64_t(channel_tiles) * row_tiles * tap_tiles * geometry.groups; }
};

// Fills the plan in, or returns false if one step does not fit into `shared_limit` bytes.
bool plan_gemm_norm(DirectNorm& problem, Precision precision, int64_t shared_limit);
bool plan_conv_norm(DirectNorm& problem, Precision precision, int64_t shared_limit);

// Enqueues on the given stream; returns the launch's error, 0 if it is queued. gemm_norm takes kernels of one tap.
int launch_gemm_norm(const DirectNorm& problem, Precision precision, void* stream);
int launch_conv_norm(const DirectNorm& problem, Precision precision, void* stream);

}  // namespace engm::cuda
