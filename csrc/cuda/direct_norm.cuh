// Direct form:  ‖G_i‖²,  G_i[o, c, tap] = Σ_t gy[i, o, t] x[i, c, t·stride + tap·dilation - padding],  never stored.
//
// x [n, C, in], gy [n, d, out], each with any strides (NHWC and NCHW without a copy); a linear layer is one tap over a
// line of T pixels. A block owns one group, kChannels input channels, kRows output channels and up to kTaps kernel taps:
// its tile of G stays in registers (kTaps·kChannels·kRows sums, spread over the warps) while the positions t of an example
// stream through shared memory, and then those of its next example: the copies of one run under the products of the
// other. The sum over t is never split, so squaring is the epilogue; there the local batch-norm correction is subtracted
// and, where wanted, the tile of G is written out.
//
// One step of the pipeline (kStages of them in flight) holds a rectangle of output positions: gy as rows of positions,
// and the pixels that those positions touch, halo included, once: a tap is nothing but another offset into them. Both
// lie as rows of channels, so that any shift, stride or dilation leaves a row where ldmatrix can read it; direct_copy.cuh
// brings them there from either order of memory. What lies outside image, output or channels is zero.
//
// Bytes: gy is read once a (channel tile, tap tile), x once a (row tile, tap tile) plus halos: 1.4 times at 16 x 8
// positions of a 3x3 kernel. FLOPs: 2·T·C·d·taps an example, rounded up to whole warps. Each block writes one partial
// sum an example.
#pragma once

#include <type_traits>

#include "direct_copy.cuh"
#include "direct_norm.h"
#include "mma.cuh"
#include "reduce.cuh"

namespace engm::cuda {

// kBlocks is how many blocks of plain norms shall share a multiprocessor, which bounds the registers.
template <class P, int kChannels_, int kRows_, int kWarpsC_, int kWarpsD_, int kTaps_, int kStages_, int kBlocks_ = 1>
struct DirectTile {
  using Policy = P;
  static constexpr int kChannels = kChannels_, kRows = kRows_, kTaps = kTaps_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kWarpsC = kWarpsC_, kWarpsD = kWarpsD_, kThreads = 32 * kWarpsC * kWarpsD;
  static constexpr int kWarpC = kChannels / kWarpsC, kWarpD = kRows / kWarpsD;  // of one warp
  static constexpr int kC = kWarpC / P::kN, kD = kWarpD / P::kM;                // matrix instructions of one warp
  static constexpr int kPitchX = kChannels + P::kPad, kPitchG = kRows + P::kPad;
  static constexpr int kVector = 16 / int(sizeof(typename P::Element));
  static_assert(kWarpC % P::kN == 0 && kWarpD % P::kM == 0);
  static_assert(kPitchX % kVector == 0 && kPitchG % kVector == 0, "rows must stay 16-byte aligned");

  // Lays a block's shared memory out. What is copied as lines has raw pieces of every step under way and rows of one, all
  // else has rows of every step.
  static SharedLayout layout(const DirectNorm& p) {
    constexpr int64_t kElement = sizeof(typename P::Element);
    const Staging &x = p.x_staging, &gy = p.gy_staging;
    SharedLayout at{};
    int64_t end = 0;
    const auto take = [&](int64_t bytes, int64_t alignment) {
      const int64_t begin = (end + alignment - 1) / alignment * alignment;
      end = begin + bytes;
      return int(begin < INT32_MAX ? begin : INT32_MAX);  // as much fits nowhere
    };
    at.positions = take(p.positions * 4, 4), at.taps = take(kTaps * 4, 4);
    at.x_places = take(x.entries * 4, 4), at.gy_places = take(gy.entries * 4, 4);
    at.x_from = take(x.entries * 16, 8), at.gy_from = take(gy.entries * 16, 8);
    at.scratch = take(kThreads / 32 * 8, 8);
    const bool x_lines = x.copies == Copies::kLines, gy_lines = gy.copies == Copies::kLines;
    const int64_t x_rows = x.rows * kPitchX * kElement, gy_rows = gy.rows * kPitchG * kElement;
    const int64_t x_raw = int64_t(kChannels) * x.raw_pitch, gy_raw = int64_t(kRows) * gy.raw_pitch;
    at.x = take((x_lines ? 1 : kStages) * x_rows, 128), at.gy = take((gy_lines ? 1 : kStages) * gy_rows, 16);
    at.x_raw = take((kStages - 1) * x_raw, 16), at.gy_raw = take((kStages - 1) * gy_raw, 16);
    at.x_stage = int(x_lines ? 0 : x_rows), at.gy_stage = int(gy_lines ? 0 : gy_rows);
    at.x_raw_stage = int(x_raw), at.gy_raw_stage = int(gy_raw);
    at.bytes = end;
    return at;
  }
};

// The kernel taps of one block, and the pixels that a rectangle of positions needs for them.
struct TapWindow {
  int first, count;  // flat taps of one kernel slice
  int z, y, x;       // the slice, and the first row and column of taps
  int halo_h, halo_w;

  __host__ __device__ TapWindow(const Geometry& g, int taps_a_tile, int tile_h, int tile_w, int tap_tile) {
    const int slice = g.kernel[1] * g.kernel[2], tiles = (slice + taps_a_tile - 1) / taps_a_tile;
    z = tap_tile / tiles;
    first = tap_tile % tiles * taps_a_tile;
    count = slice - first < taps_a_tile ? slice - first : taps_a_tile;
    y = first / g.kernel[2];
    const int last_y = (first + count - 1) / g.kernel[2];
    x = y == last_y ? first % g.kernel[2] : 0;
    const int last_x = y == last_y ? (first + count - 1) % g.kernel[2] : g.kernel[2] - 1;
    halo_h = (tile_h - 1) * g.stride[1] + (last_y - y) * g.dilation[1] + 1;
    halo_w = (tile_w - 1) * g.stride[2] + (last_x - x) * g.dilation[2] + 1;
  }
};

// Returns this lane's sum of squares of the warp's tile; if it is not plain, after the correction, and writes the tile
// where gradients are wanted.
template <class Tile, bool kPlain>
__device__ __forceinline__ typename Tile::Policy::Sum direct_epilogue(
    const DirectNorm& p, typename Tile::Policy::Sum (&sums)[Tile::kTaps][Tile::kD][Tile::kC][Tile::Policy::kSums],
    int64_t example, int group, int first_channel, int first_row, const TapWindow& taps, int lane) {
  using P = typename Tile::Policy;
  using Sum = typename P::Sum;
  const Geometry& g = p.geometry;
  const int all_taps = g.taps(), all_rows = g.groups * g.rows;
  const int first_tap = taps.z * g.kernel[1] * g.kernel[2] + taps.first;
  Sum totals[P::kSums] = {};  // several, so that an addition need not wait for the one before
  // Taps are innermost: they are neighbours in memory and share their addresses.
#pragma unroll
  for (int m = 0; m < Tile::kD; ++m)
#pragma unroll
    for (int n = 0; n < Tile::kC; ++n)
#pragma unroll
      for (int e = 0; e < P::kSums; ++e) {
        const int row = first_row + m * P::kM + P::sum_m(lane, e), c = first_channel + n * P::kN + P::sum_n(lane, e);
        if (!kPlain && (c >= g.channels || row >= g.rows)) continue;
        const int64_t o = group * g.rows + row, at = (o * g.channels + c) * all_taps + first_tap;
        const int64_t io = example * all_rows + o, mean = int64_t(group * g.channels + c) * all_taps + first_tap;
#pragma unroll
        for (int tap = 0; tap < Tile::kTaps; ++tap) {
          Sum v = sums[tap][m][n][e];
          if (!kPlain) {
            if (tap >= taps.count) break;
            if (p.shift != nullptr)
              v -= static_cast<const Sum*>(p.shift)[io] * static_cast<const Sum*>(p.patch_mean)[mean + tap] +
                   static_cast<const Sum*>(p.scale)[io] * static_cast<const Sum*>(p.correlation)[at + tap];
            if (p.grads != nullptr)
              static_cast<Sum*>(p.grads)[example * all_rows * g.channels * all_taps + at + tap] = v;
          }
          totals[e] += v * v;
        }
      }
#pragma unroll
  for (int e = 1; e < P::kSums; ++e) totals[0] += totals[e];
  return totals[0];
}

// Adds one step's positions to the warp's sums. x and gy point at the lane's column of the warp's tile. With all taps
// there is no branch between the products of one position: fragments of the next tap load while this one multiplies.
// kD is how many products high the warp's tile is, all of it or, where the other rows are none, half.
template <class Tile, bool kAllTaps, int kD>
__device__ __forceinline__ void multiply_step(
    typename Tile::Policy::Sum (&sums)[Tile::kTaps][Tile::kD][Tile::kC][Tile::Policy::kSums],
    const char* x, const typename Tile::Policy::Element* gy, const int* position_at, int positions,
    const int (&tap_offset)[Tile::kTaps], int count, int lane) {
  using P = typename Tile::Policy;
  using E = typename P::Element;
  int at_x[P::kRows], at_gy[P::kRows];
#pragma unroll
  for (int j = 0; j < P::kRows; ++j) at_gy[j] = P::a_row(lane, j) * Tile::kPitchG;
  const int* const behind = position_at + positions;
#pragma unroll 1
  do {
    const int first_x = position_at[P::b_row(lane, 0)];
#pragma unroll
    for (int j = 0; j < P::kRows; ++j) at_x[j] = (position_at[P::b_row(lane, j)] - first_x) / int(sizeof(E));
    typename P::A a[kD];
#pragma unroll
    for (int m = 0; m < kD; ++m) P::load_a(a[m], gy + m * P::kM, at_gy);
#pragma unroll
    for (int tap = 0; tap < Tile::kTaps; ++tap) {
      if (!kAllTaps && tap >= count) break;
#pragma unroll
      for (int n = 0; n < Tile::kC; ++n) {
        typename P::B b;
        P::load_b(b, reinterpret_cast<const E*>(x + (first_x + tap_offset[tap])) + n * P::kN, at_x);
#pragma unroll
        for (int m = 0; m < kD; ++m) P::mma(sums[tap][m][n], a[m], b);
      }
    }
    position_at += P::kK, gy += P::kK * Tile::kPitchG;
  } while (position_at < behind);
}

// Where a block is in its sequence of steps: an example, and the first output position of a step.
struct Place {
  int example;
  Origin origin;
};

// A block keeps its tile and takes every example_step-th example, one behind the other through one pipeline. Tiles are
// innermost, so that neighbouring blocks share an example, which then stays in L2. Plain are norms of all examples,
// without a correction and without gradients.
template <class Tile, bool kPlain>
__global__ void __launch_bounds__(Tile::kThreads, kPlain ? Tile::kBlocks : 1) direct_norm_kernel(DirectNorm p) {
  using P = typename Tile::Policy;
  using E = typename P::Element;
  using Sum = typename P::Sum;
  constexpr int kStages = Tile::kStages, kThreads = Tile::kThreads, kRowBytes = Tile::kPitchX * int(sizeof(E));
  ENGM_SHARED(unsigned char, shared);
  const Geometry& g = p.geometry;
  const SharedLayout& at = p.layout;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned tiles = unsigned(p.tiles()), number = blockIdx.x % tiles, first = blockIdx.x / tiles;
  if (!kPlain && p.done != nullptr) {  // nearly always nothing is left: every warp looks at all of the block's examples
    bool left = false;
    const int n = int(g.n), step = p.example_step;  // the launcher has seen that they fit
    for (int e = int(first) + lane * step; e < n; e += 32 * step) left |= !p.done[e];
    if (!any_lane(left)) return;
  }
  unsigned tile = number;
  const int c0 = int(tile % p.channel_tiles) * Tile::kChannels;
  tile /= p.channel_tiles;
  const int d0 = int(tile % p.row_tiles) * Tile::kRows;
  tile /= p.row_tiles;
  const TapWindow taps(g, p.taps_a_tile, p.tile_h, p.tile_w, int(tile % p.tap_tiles));
  const int group = int(tile / p.tap_tiles);
  int* position_at = reinterpret_cast<int*>(shared + at.positions);  // [positions] bytes to its first pixel
  int* tap_at = reinterpret_cast<int*>(shared + at.taps);            // [kTaps] bytes from the first tap to this one
  const auto elements = [&](int bytes) { return reinterpret_cast<E*>(shared + bytes); };

  const int64_t first_channel = int64_t(group) * g.channels + c0, first_row = int64_t(group) * g.rows + d0;
  const Window<P, Tile::kChannels, Tile::kPitchX, kThreads> x{
      p.x, p.x_staging, static_cast<const E*>(p.x.data) + first_channel * p.x.channel, g.channels - c0, g.in[0], g.in[1],
      g.in[2], taps.halo_h, taps.halo_w, reinterpret_cast<int*>(shared + at.x_places),
      reinterpret_cast<int64_t*>(shared + at.x_from)};
  const Window<P, Tile::kRows, Tile::kPitchG, kThreads> gy{
      p.gy, p.gy_staging, static_cast<const E*>(p.gy.data) + first_row * p.gy.channel, g.rows - d0, g.out[0], g.out[1],
      g.out[2], p.tile_h, p.tile_w, reinterpret_cast<int*>(shared + at.gy_places),
      reinterpret_cast<int64_t*>(shared + at.gy_from)};

  x.begin(elements(at.x_raw), kStages - 1);
  gy.begin(elements(at.gy_raw), kStages - 1);
#pragma unroll 1
  for (int e = threadIdx.x; e < p.positions; e += kThreads) {
    const int y = e / p.tile_w, x = e % p.tile_w;
    position_at[e] = y < p.tile_h ? (y * g.stride[1] * taps.halo_w + x * g.stride[2]) * kRowBytes : 0;
  }
#pragma unroll 1
  for (int e = threadIdx.x; e < Tile::kTaps; e += kThreads) {
    const int tap = taps.first + (e < taps.count ? e : 0);
    const int y = tap / g.kernel[2] - taps.y, x = tap % g.kernel[2] - taps.x;
    tap_at[e] = (y * g.dilation[1] * taps.halo_w + x * g.dilation[2]) * kRowBytes;
  }

  const auto origin_in_x = [&](const Origin& o) {
    return Origin{o.z * g.stride[0] + taps.z * g.dilation[0] - g.padding[0],
                  o.y * g.stride[1] + taps.y * g.dilation[1] - g.padding[1],
                  o.x * g.stride[2] + taps.x * g.dilation[2] - g.padding[2]};
  };
  const auto aim = [&](int step, const Place& place) {
    if (int(threadIdx.x) >= p.most_entries) return;  // most warps, where images are small
    x.aim(step & 1, place.example, origin_in_x(place.origin));
    gy.aim(step & 1, place.example, place.origin);
  };
  const auto load = [&](int step) {
    const int raw = step % (kStages - 1), rows = step % kStages;
    x.load(elements(x.lines() ? at.x_raw + raw * at.x_raw_stage : at.x + rows * at.x_stage), step & 1);
    gy.load(elements(gy.lines() ? at.gy_raw + raw * at.gy_raw_stage : at.gy + rows * at.gy_stage), step & 1);
  };
  const int examples = int(g.n);  // the launcher has seen that they fit
  const auto undone = [&](int example) {
    while (!kPlain && p.done != nullptr && example < examples && p.done[example]) example += p.example_step;
    return example;
  };
  const auto advance = [&](Place& place) {
    Origin& o = place.origin;
    o.x += p.tile_w;
    if (o.x < g.out[2]) return;
    o.x = 0, o.y += p.tile_h;
    if (o.y < g.out[1]) return;
    o.y = 0, ++o.z;
    if (o.z < g.out[0]) return;
    o.z = 0, place.example = undone(place.example + p.example_step);
  };

  const int warp_c = warp % Tile::kWarpsC * Tile::kWarpC, warp_d = warp / Tile::kWarpsC * Tile::kWarpD;
  // What a warp would multiply for nothing, where channels or rows are not a multiple of the tile's.
  const bool idle = c0 + warp_c >= g.channels || d0 + warp_d >= g.rows;
  const bool half = Tile::kD > 1 && d0 + warp_d + (Tile::kD + 1) / 2 * P::kM >= g.rows;
  Place places[kStages]{};  // the step to multiply next, those under way behind it, and the one to load next
  Place &now = places[0], &ahead = places[kStages - 1];
  ahead = {undone(int(first)), {0, 0, 0}};
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) {
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) places[i] = places[i + 1];
    const bool more = ahead.example < examples;
    if (more) aim(s, ahead);
    __syncthreads();  // the tables are there for everybody, and everybody is done with those before
    if (more) load(s), advance(ahead);
    copy_async_commit();
  }
  int tap_offset[Tile::kTaps];
#pragma unroll
  for (int tap = 0; tap < Tile::kTaps; ++tap) tap_offset[tap] = tap_at[tap];
  int step = 0;
#pragma unroll 1
  while (now.example < examples) {
    const int example = now.example;
    Sum sums[Tile::kTaps][Tile::kD][Tile::kC][P::kSums] = {};
#pragma unroll 1
    do {
      const bool more = ahead.example < examples;
      if (more) aim(step + kStages - 1, ahead);
      copy_async_wait<kStages - 2>();
      __syncthreads();  // this step and the next one's table are there for everybody, and the step before is done with
      E* x_rows = elements(at.x + step % kStages * at.x_stage);
      E* gy_rows = elements(at.gy + step % kStages * at.gy_stage);
      if (P::kRoundOnArrival || x.lines() || gy.lines()) {
        const int raw = step % (kStages - 1);
        const bool new_columns = step == 0 || p.tile_w < g.out[2];
        x.prepare(x_rows, elements(at.x_raw + raw * at.x_raw_stage), origin_in_x(now.origin), new_columns);
        gy.prepare(gy_rows, elements(at.gy_raw + raw * at.gy_raw_stage), now.origin, new_columns);
        __syncthreads();  // rows are ready, and raw pieces are free again
      }
      if (more) load(step + kStages - 1);
      copy_async_commit();
#pragma unroll
      for (int s = 0; s < kStages - 1; ++s) places[s] = places[s + 1];
      if (more) advance(ahead);
      const char* x_column = reinterpret_cast<const char*>(x_rows + P::b_column(lane) + warp_c);
      const E* gy_column = gy_rows + P::a_column(lane) + warp_d;
      const auto multiply = [&](auto all_taps, auto height) {
        multiply_step<Tile, decltype(all_taps)::value, decltype(height)::value>(
            sums, x_column, gy_column, position_at, p.positions, tap_offset, taps.count, lane);
      };
      if (idle)
        ;
      else if (taps.count != Tile::kTaps)
        multiply(std::false_type{}, std::integral_constant<int, Tile::kD>{});
      else if (half)
        multiply(std::true_type{}, std::integral_constant<int, (Tile::kD + 1) / 2>{});
      else
        multiply(std::true_type{}, std::integral_constant<int, Tile::kD>{});
      ++step;
    } while (now.example == example);
    const Sum squares = direct_epilogue<Tile, kPlain>(p, sums, example, group, c0 + warp_c, d0 + warp_d, taps, lane);
    // The warps' sums are read behind a barrier, and written again behind those of the next step.
    const Sum total = block_sum<kThreads>(squares, reinterpret_cast<Sum*>(shared + at.scratch));
    if (threadIdx.x == 0) static_cast<Sum*>(p.partial)[int64_t(example) * tiles + number] = total;
  }
}

}  // namespace engm::cuda
