// Plans and launches the tiles of the direct form. gemm_norm.cuh and conv_norm.cuh choose among the tiles, and one .cu
// a precision instantiates each.
#pragma once

#include <algorithm>
#include <limits>

#include "direct_norm.cuh"
#include "launch.cuh"

namespace engm::cuda {

inline int tiles_of(int64_t length, int tile) { return int((length + tile - 1) / tile); }

// The most pixels that any tap tile needs of one step, their lines and columns.
struct Halo {
  int64_t pixels = 0;
  int height = 0, width = 0;
};
inline Halo largest_halo(const DirectNorm& p) {
  Halo most;
  for (int tile = 0; tile < p.tap_tiles; ++tile) {
    const TapWindow taps(p.geometry, p.taps_a_tile, p.tile_h, p.tile_w, tile);
    most.pixels = std::max(most.pixels, int64_t(taps.halo_h) * taps.halo_w);
    most.height = std::max(most.height, taps.halo_h), most.width = std::max(most.width, taps.halo_w);
  }
  return most;
}

// Plans the copies of windows of height × width pixels, which go to so many rows of kWidth channels, of images so many
// pixels wide.
template <class Tile, int kWidth>
void plan_staging(Staging& s, const Operand& operand, int rows, int height, int width, int image) {
  constexpr int kBatchCost = 24, kPieceCost = 24, kBatchThreads = Staging::kBatch * Tile::kThreads;  // instructions
  s.rows = s.entries = rows;
  s.raw_pitch = 0;
  if (s.copies != Copies::kLines) return;
  s.line_pieces = std::min((width + Tile::kVector - 2) / Tile::kVector + 1, image / Tile::kVector);
  s.entries = height * s.line_pieces;
  s.raw_pitch = (s.entries | 1) * 16;
  s.lanes = 8, s.batches = 0;
  int64_t best = std::numeric_limits<int64_t>::max();
  for (int lanes = 32; lanes >= 4; lanes /= 2) {
    const int batches = kWidth * lanes / kBatchThreads;
    if (batches * kBatchThreads != kWidth * lanes) continue;
    const int64_t cost = tiles_of(s.entries, lanes) * (batches * kBatchCost + kPieceCost);
    if (cost < best) best = cost, s.lanes = lanes, s.batches = batches;
  }
  s.channel = uint32_t(operand.channel * sizeof(typename Tile::Policy::Element));  // the binding has seen that it fits
  s.whole = s.batches > 0 ? kWidth : std::numeric_limits<int>::max();
  s.shift = 0;
  while (1 << s.shift < s.lanes) ++s.shift;
  s.step = Tile::kThreads / s.lanes;
  for (int j = 0; j < Staging::kBatch; ++j)
    s.far[j] = int64_t(j + 1) * s.step * s.channel, s.raw_far[j] = (j + 1) * s.step * s.raw_pitch;
}

// How many pixels of a step are copied, those of the image beside a window that share its pieces too.
template <class Tile>
double copied_pixels(const Staging& s) {
  return s.copies == Copies::kLines ? double(s.entries) * Tile::kVector : s.rows;
}

// Takes the rectangle of at most `most_positions` output positions that costs least, of those whose steps fit into
// `limit` bytes. A step costs its matrix products, a copy for every row of pixels or positions, and a barrier.
template <class Tile>
bool plan_rectangle(DirectNorm& p, int most_positions, int64_t limit) {
  using P = typename Tile::Policy;
  const Geometry& g = p.geometry;
  constexpr double kRowCopies = 1.0 / 16, kBarrier = 4;
  double best = std::numeric_limits<double>::infinity();
  DirectNorm chosen = p;
  for (int w = 1; w <= most_positions && (w == 1 || w <= g.out[2]); ++w) {
    for (int h = most_positions / w; h >= 1; h = h > 1 ? h / 2 : 0) {
      DirectNorm q = p;
      q.tile_w = w, q.tile_h = h < g.out[1] || h == 1 ? h : g.out[1];
      q.positions = tiles_of(q.tile_h * q.tile_w, P::kK) * P::kK;
      const Halo halo = largest_halo(q);
      if (halo.pixels >= 1 << 16) continue;
      q.halo = int(halo.pixels);
      plan_staging<Tile, Tile::kChannels>(q.x_staging, q.x, q.halo, halo.height, halo.width, g.in[2]);
      plan_staging<Tile, Tile::kRows>(q.gy_staging, q.gy, q.positions, q.tile_h, q.tile_w, g.out[2]);
      q.most_entries = std::max(q.x_staging.entries, q.gy_staging.entries);
      q.layout = Tile::layout(q);
      if (q.layout.bytes > limit) continue;
      const double steps = double(tiles_of(g.out[1], q.tile_h)) * tiles_of(g.out[2], q.tile_w);
      const double copied = copied_pixels<Tile>(q.x_staging) + copied_pixels<Tile>(q.gy_staging);
      const double cost =
          steps * (double(q.positions) / P::kK * (p.taps_a_tile + 1) + copied * kRowCopies + kBarrier);
      if (cost < best) best = cost, chosen = q;
    }
  }
  p = chosen;
  return best < std::numeric_limits<double>::infinity();
}

// Takes as many taps a tile as fit. Fewer taps need fewer pixels, which is the way out for kernels that are dilated
// far.
template <class Tile>
bool plan_tile(DirectNorm& p, int most_positions, int64_t limit) {
  const Geometry& g = p.geometry;
  const int slice = g.kernel[1] * g.kernel[2];
  p.channel_tiles = tiles_of(g.channels, Tile::kChannels), p.row_tiles = tiles_of(g.rows, Tile::kRows);
  for (int taps = Tile::kTaps < slice ? Tile::kTaps : slice; taps >= 1; taps = taps > 3 ? 3 : taps > 1 ? 1 : 0) {
    p.taps_a_tile = taps;
    p.tap_tiles = tiles_of(slice, taps) * g.kernel[0];
    if (plan_rectangle<Tile>(p, most_positions, limit)) return true;
  }
  return false;
}

// How many blocks share a tile's examples, so that all blocks are done soonest: a block has work for every example and
// some of its own, and `resident` of them run at once.
inline int64_t plan_example_step(int64_t n, int64_t tiles, double steps, int64_t resident) {
  constexpr double kOwnSteps = 1;  // a block's tables and its wait for the first step, as steps
  constexpr int64_t kMostExamples = 64;
  double best = std::numeric_limits<double>::infinity();
  int64_t chosen = n;
  for (int64_t each = 1; each <= std::min(n, kMostExamples); ++each) {
    const int64_t share = (n + each - 1) / each, turns = (share * tiles + resident - 1) / resident;
    const double cost = double(turns) * (double(each) * steps + kOwnSteps);
    if (cost < best) best = cost, chosen = share;
  }
  return chosen;
}

template <class Tile>
int launch_tile(DirectNorm p, void* stream) {
  constexpr int kBlocksEach = 2;  // blocks of a multiprocessor, where most will find nothing to do
  const Geometry& g = p.geometry;
  const double steps = double(g.out[0]) * tiles_of(g.out[1], p.tile_h) * tiles_of(g.out[2], p.tile_w);
  const int64_t share = p.done != nullptr
                            ? std::min(g.n, (int64_t(kBlocksEach) * p.multiprocessors + p.tiles() - 1) / p.tiles())
                            : plan_example_step(g.n, p.tiles(), steps, int64_t(Tile::kBlocks) * p.multiprocessors);
  constexpr int kTooMany = 9;  // cudaErrorInvalidConfiguration
  if (g.n + share > std::numeric_limits<int>::max()) return kTooMany;
  p.example_step = int(share);
  const int64_t blocks = share * p.tiles();
  const bool plain = p.shift == nullptr && p.grads == nullptr && p.done == nullptr;
  return plain ? launch(direct_norm_kernel<Tile, true>, blocks, Tile::kThreads, p.layout.bytes, stream, p)
               : launch(direct_norm_kernel<Tile, false>, blocks, Tile::kThreads, p.layout.bytes, stream, p);
}

}  // namespace engm::cuda
