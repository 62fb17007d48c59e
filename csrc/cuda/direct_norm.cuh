// Direct form:  ‖G_i‖²,  G_i[o, c, tap] = Σ_t gy[i, o, t] x[i, c, t·stride + tap·dilation - padding],  never stored.
//
// x [n, C, in], gy [n, d, out], each with any strides (NHWC and NCHW without a copy); a linear layer is one tap over a
// line of T pixels. A block owns one example, one group, kChannels input channels, kRows output channels and up to
// kTaps kernel taps: its tile of G stays in registers (kTaps·kChannels·kRows sums, spread over the warps) while the
// positions t stream through shared memory. The sum over t is never split, so squaring is the epilogue; there the local
// batch-norm correction is subtracted and, where wanted, the tile of G is written out.
//
// One step of the pipeline (kStages of them in flight) holds a rectangle of output positions: gy as rows of positions,
// and the pixels that those positions touch, halo included, once: a tap is nothing but another offset into them. Both
// lie as rows of channels, so that any shift, stride or dilation leaves a row where ldmatrix can read it; NCHW is
// transposed on its way in, element by element. What lies outside image, output or channels is zero.
//
// Bytes: gy is read once a (channel tile, tap tile), x once a (row tile, tap tile) plus halos: 1.7 times at 4 x 16
// positions of a 3x3 kernel. FLOPs: 2·T·C·d·taps an example, rounded up to whole tiles. Each block writes one partial
// sum.
#pragma once

#include "direct_norm.h"
#include "mma.cuh"
#include "pack.cuh"
#include "reduce.cuh"

namespace engm::cuda {

template <class P, int kChannels_, int kRows_, int kWarpsC_, int kWarpsD_, int kTaps_, int kStages_>
struct DirectTile {
  using Policy = P;
  static constexpr int kChannels = kChannels_, kRows = kRows_, kTaps = kTaps_, kStages = kStages_;
  static constexpr int kWarpsC = kWarpsC_, kWarpsD = kWarpsD_, kThreads = 32 * kWarpsC * kWarpsD;
  static constexpr int kWarpC = kChannels / kWarpsC, kWarpD = kRows / kWarpsD;  // of one warp
  static constexpr int kC = kWarpC / P::kN, kD = kWarpD / P::kM;                // matrix instructions of one warp
  static constexpr int kPitchX = kChannels + P::kPad, kPitchG = kRows + P::kPad;
  static constexpr int kVector = 16 / int(sizeof(typename P::Element));
  static_assert(kWarpC % P::kN == 0 && kWarpD % P::kM == 0);
  static_assert(kPitchX % kVector == 0 && kPitchG % kVector == 0, "rows must stay 16-byte aligned");

  static __host__ __device__ int64_t stage_elements(int halo, int positions) {
    return int64_t(halo) * kPitchX + int64_t(positions) * kPitchG;
  }
  // The tables come first: halo pixels, positions as pixels of the halo, positions as outputs, taps, warp sums.
  static __host__ __device__ int64_t table_bytes(int halo, int positions) {
    return (int64_t(halo + 2 * positions + kTaps) * 4 + kThreads / 32 * 8 + 8 + 127) / 128 * 128;
  }
  static __host__ __device__ int64_t shared_bytes(int halo, int positions) {
    return table_bytes(halo, positions) + kStages * stage_elements(halo, positions) * sizeof(typename P::Element);
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

// Brings rows of one operand into shared memory: row r holds channels [first, first + kWidth) of the pixel whose place
// in the image is origin + table[r].
template <class E, int kWidth, int kPitch, int kThreads, bool kVectors>
struct RowLoader {
  const E* data;  // the example's first channel of this block
  int64_t channel, stride_y, stride_x;
  int channels;  // how many are valid from there on, may exceed kWidth
  int h, w;      // the image
  bool by_position;  // neighbouring positions are neighbours in memory

  __device__ __forceinline__ void operator()(E* to, const int* table, int rows, bool slice_inside, int y, int x) const {
    if constexpr (kVectors) {
      constexpr int kVector = 16 / int(sizeof(E)), kChunks = kWidth / kVector;
      for (int e = threadIdx.x; e < rows * kChunks; e += kThreads) {
        const int row = e / kChunks, c = e % kChunks * kVector;
        const E* from = pixel(table[row], slice_inside, y, x);
        const int left = (channels - c) * int(sizeof(E)), bytes = from == nullptr || left < 0 ? 0 : left > 16 ? 16 : left;
        copy_async_16(to + row * kPitch + c, bytes ? from + c : data, bytes);
      }
    } else {
      const int rounded = by_position ? (rows + 7) / 8 * 8 : rows;
      if constexpr (sizeof(E) == 2) {
        small_elements(to, table, rows, rounded * kWidth, slice_inside, y, x);
      } else {
        for (int e = threadIdx.x; e < rounded * kWidth; e += kThreads) {
          const int row = row_of(e), c = channel_of(e);
          if (row >= rows) continue;
          const E* from = pixel(table[row], slice_inside, y, x);
          const bool valid = from != nullptr && c < channels;
          copy_async_element<int(sizeof(E))>(to + row * kPitch + c, valid ? from + c * channel : data, valid);
        }
      }
    }
  }

  // Copies elements of 2 bytes, for which there is no asynchronous copy: loads in batches, so that some are under way,
  // then stores.
  __device__ __forceinline__ void small_elements(E* to, const int* table, int rows, int end, bool slice_inside, int y,
                                                 int x) const {
    constexpr int kBatch = 8;
#pragma unroll 1
    for (int first = threadIdx.x; first < end; first += kBatch * kThreads) {
      E batch[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int e = first + j * kThreads, row = row_of(e), c = channel_of(e);
        const E* from = pixel(row < rows ? table[row] : -1, slice_inside, y, x);
        const bool valid = from != nullptr && c < channels;
        batch[j] = *(valid ? from + c * channel : data);
        if (!valid) batch[j] = E{};
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int e = first + j * kThreads, row = row_of(e);
        if (row < rows) to[row * kPitch + channel_of(e)] = batch[j];
      }
    }
  }

  // Rounds to TF32 what this thread copied. The copies must have arrived, and no other thread may have read them.
  __device__ __forceinline__ void round(E* to, int rows) const {
    if constexpr (kVectors) {
      constexpr int kChunks = kWidth / 4;
      for (int e = threadIdx.x; e < rows * kChunks; e += kThreads) {
        E* chunk = to + e / kChunks * kPitch + e % kChunks * 4;
        auto four = load_pack<E, 4>(chunk);
#pragma unroll
        for (int j = 0; j < 4; ++j) four.at[j] = __uint_as_float(to_tf32(four.at[j]));
        store_pack(chunk, four);
      }
    } else {
      const int rounded = by_position ? (rows + 7) / 8 * 8 : rows;
      for (int e = threadIdx.x; e < rounded * kWidth; e += kThreads) {
        const int row = row_of(e), c = channel_of(e);
        if (row < rows) to[row * kPitch + c] = __uint_as_float(to_tf32(to[row * kPitch + c]));
      }
    }
  }

  // Row and channel of element e of the copy. Where positions are contiguous, a warp takes 8 of them and 4 channels
  // (whole sectors in, at most two-way conflicts out); else it takes 32 channels.
  __device__ __forceinline__ int row_of(int e) const {
    return by_position ? (e & 7) + (e >> 5) / (kWidth / 4) * 8 : e / kWidth;
  }
  __device__ __forceinline__ int channel_of(int e) const {
    return by_position ? ((e >> 3) & 3) + (e >> 5) % (kWidth / 4) * 4 : e % kWidth;
  }

  // The pixel of a table entry, null outside the image. Entries are y << 16 | x, and negative for rows that are none.
  __device__ __forceinline__ const E* pixel(int entry, bool slice_inside, int y, int x) const {
    y += entry >> 16, x += entry & 0xffff;
    // There are no short circuits: a branch here would keep the loads of a batch apart.
    const bool inside = slice_inside & (entry >= 0) & (unsigned(y) < unsigned(h)) & (unsigned(x) < unsigned(w));
    return inside ? data + y * stride_y + x * stride_x : nullptr;
  }
};

// Returns this lane's sum of squares of the warp's tile, after the correction, and writes the tile where gradients are
// wanted.
template <class Tile>
__device__ __forceinline__ typename Tile::Policy::Sum direct_epilogue(
    const DirectNorm& p, typename Tile::Policy::Sum (&sums)[Tile::kTaps][Tile::kD][Tile::kC][Tile::Policy::kSums],
    int64_t example, int group, int first_channel, int first_row, const TapWindow& taps, int lane) {
  using P = typename Tile::Policy;
  using Sum = typename P::Sum;
  const Geometry& g = p.geometry;
  const int all_taps = g.taps(), all_rows = g.groups * g.rows;
  const int first_tap = taps.z * g.kernel[1] * g.kernel[2] + taps.first;
  const bool plain = p.shift == nullptr && p.grads == nullptr;
  Sum total = 0;
  // Taps are innermost: they are neighbours in memory and share their addresses.
#pragma unroll
  for (int m = 0; m < Tile::kD; ++m)
#pragma unroll
    for (int n = 0; n < Tile::kC; ++n)
#pragma unroll
      for (int e = 0; e < P::kSums; ++e) {
        const int row = first_row + m * P::kM + P::sum_m(lane, e), c = first_channel + n * P::kN + P::sum_n(lane, e);
        if (!plain && (c >= g.channels || row >= g.rows)) continue;
        const int64_t o = group * g.rows + row, at = (o * g.channels + c) * all_taps + first_tap;
        const int64_t io = example * all_rows + o, mean = int64_t(group * g.channels + c) * all_taps + first_tap;
#pragma unroll
        for (int tap = 0; tap < Tile::kTaps; ++tap) {
          Sum v = sums[tap][m][n][e];
          if (!plain) {
            if (tap >= taps.count) break;
            if (p.shift != nullptr)
              v -= static_cast<const Sum*>(p.shift)[io] * static_cast<const Sum*>(p.patch_mean)[mean + tap] +
                   static_cast<const Sum*>(p.scale)[io] * static_cast<const Sum*>(p.correlation)[at + tap];
            if (p.grads != nullptr)
              static_cast<Sum*>(p.grads)[example * all_rows * g.channels * all_taps + at + tap] = v;
          }
          total += v * v;
        }
      }
  return total;
}

// Adds one step's positions to the warp's sums. x and gy point at the lane's column of the warp's tile. With all taps
// there is no branch between the products of one position: fragments of the next tap load while this one multiplies.
template <class Tile, bool kAllTaps>
__device__ __forceinline__ void multiply_step(
    typename Tile::Policy::Sum (&sums)[Tile::kTaps][Tile::kD][Tile::kC][Tile::Policy::kSums],
    const typename Tile::Policy::Element* x, const typename Tile::Policy::Element* gy, const int* position_at,
    int positions, const int (&tap_offset)[Tile::kTaps], int count, int lane) {
  using P = typename Tile::Policy;
#pragma unroll 1
  for (int k = 0; k < positions; k += P::kK) {
    int at_x[P::kRows], at_gy[P::kRows];
#pragma unroll
    for (int j = 0; j < P::kRows; ++j) {
      at_x[j] = position_at[k + P::b_row(lane, j)];
      at_gy[j] = (k + P::a_row(lane, j)) * Tile::kPitchG;
    }
    typename P::A a[Tile::kD];
#pragma unroll
    for (int m = 0; m < Tile::kD; ++m) P::load_a(a[m], gy + m * P::kM, at_gy);
#pragma unroll
    for (int tap = 0; tap < Tile::kTaps; ++tap) {
      if (!kAllTaps && tap >= count) break;
#pragma unroll
      for (int n = 0; n < Tile::kC; ++n) {
        typename P::B b;
        P::load_b(b, x + tap_offset[tap] + n * P::kN, at_x);
#pragma unroll
        for (int m = 0; m < Tile::kD; ++m) P::mma(sums[tap][m][n], a[m], b);
      }
    }
  }
}

// Works on the tile of the given number. Examples are outermost, so that neighbouring blocks share one, which then
// stays in L2.
template <class Tile, bool kVectors>
__device__ __forceinline__ void direct_norm_tile(const DirectNorm& p, int64_t number, unsigned char* shared) {
  using P = typename Tile::Policy;
  using E = typename P::Element;
  using Sum = typename P::Sum;
  const Geometry& g = p.geometry;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t tiles = p.tiles(), example = number / tiles;
  if (p.done != nullptr && p.done[example]) return;
  int tile = int(number % tiles);
  const int c0 = tile % p.channel_tiles * Tile::kChannels;
  tile /= p.channel_tiles;
  const int d0 = tile % p.row_tiles * Tile::kRows;
  tile /= p.row_tiles;
  const TapWindow taps(g, p.taps_a_tile, p.tile_h, p.tile_w, tile % p.tap_tiles);
  const int group = tile / p.tap_tiles, halo = taps.halo_h * taps.halo_w;

  int* halo_pixel = reinterpret_cast<int*>(shared);     // [halo] y << 16 | x
  int* position_at = halo_pixel + p.halo;               // [positions] element offset of its first pixel in the halo
  int* position_pixel = position_at + p.positions;      // [positions] y << 16 | x, or -1
  int* tap_at = position_pixel + p.positions;           // [kTaps] element offset of a tap from the first
  E* stages = reinterpret_cast<E*>(shared + Tile::table_bytes(p.halo, p.positions));
  const int64_t stage = Tile::stage_elements(p.halo, p.positions);

  for (int e = threadIdx.x; e < halo; e += Tile::kThreads) halo_pixel[e] = e / taps.halo_w << 16 | e % taps.halo_w;
  for (int e = threadIdx.x; e < p.positions; e += Tile::kThreads) {
    const int y = e / p.tile_w, x = e % p.tile_w;
    const bool inside = y < p.tile_h;
    position_at[e] = inside ? (y * g.stride[1] * taps.halo_w + x * g.stride[2]) * Tile::kPitchX : 0;
    position_pixel[e] = inside ? y << 16 | x : -1;
  }
  for (int e = threadIdx.x; e < Tile::kTaps; e += Tile::kThreads) {
    const int tap = taps.first + (e < taps.count ? e : 0);
    const int y = tap / g.kernel[2] - taps.y, x = tap % g.kernel[2] - taps.x;
    tap_at[e] = (y * g.dilation[1] * taps.halo_w + x * g.dilation[2]) * Tile::kPitchX;
  }
  __syncthreads();

  const int tiles_y = (g.out[1] + p.tile_h - 1) / p.tile_h, tiles_x = (g.out[2] + p.tile_w - 1) / p.tile_w;
  const int64_t first_channel = int64_t(group) * g.channels + c0, first_row = int64_t(group) * g.rows + d0;
  RowLoader<E, Tile::kChannels, Tile::kPitchX, Tile::kThreads, kVectors> load_x{
      static_cast<const E*>(p.x.data) + example * p.x.example + first_channel * p.x.channel,
      p.x.channel, p.x.space[1], p.x.space[2], g.channels - c0, g.in[1], g.in[2], p.x.channel != 1};
  RowLoader<E, Tile::kRows, Tile::kPitchG, Tile::kThreads, kVectors> load_gy{
      static_cast<const E*>(p.gy.data) + example * p.gy.example + first_row * p.gy.channel,
      p.gy.channel, p.gy.space[1], p.gy.space[2], g.rows - d0, g.out[1], g.out[2], p.gy.channel != 1};
  const auto load = [&](int step) {
    E* to = stages + step % Tile::kStages * stage;
    const int x0 = step % tiles_x * p.tile_w, y0 = step / tiles_x % tiles_y * p.tile_h, z = step / tiles_x / tiles_y;
    const int in_z = z * g.stride[0] + taps.z * g.dilation[0] - g.padding[0];
    auto from = load_x;
    from.data += in_z * p.x.space[0];
    const bool inside = unsigned(in_z) < unsigned(g.in[0]);
    if (!inside) from.data = load_x.data;
    from(to, halo_pixel, halo, inside, y0 * g.stride[1] + taps.y * g.dilation[1] - g.padding[1],
         x0 * g.stride[2] + taps.x * g.dilation[2] - g.padding[2]);
    auto from_gy = load_gy;
    from_gy.data += z * p.gy.space[0];
    from_gy(to + p.halo * Tile::kPitchX, position_pixel, p.positions, true, y0, x0);
  };

  const int warp_c = warp % Tile::kWarpsC * Tile::kWarpC, warp_d = warp / Tile::kWarpsC * Tile::kWarpD;
  int tap_offset[Tile::kTaps];
#pragma unroll
  for (int tap = 0; tap < Tile::kTaps; ++tap) tap_offset[tap] = tap_at[tap];
  const int steps = g.out[0] * tiles_y * tiles_x;
  Sum sums[Tile::kTaps][Tile::kD][Tile::kC][P::kSums] = {};
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    if (s < steps) load(s);
    copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<Tile::kStages - 2>();
    if constexpr (P::kRoundOnArrival) {
      E* arrived = stages + step % Tile::kStages * stage;
      load_x.round(arrived, halo);
      load_gy.round(arrived + p.halo * Tile::kPitchX, p.positions);
    }
    __syncthreads();  // this step has arrived for everybody, and everybody is done with the one before
    if (step + Tile::kStages - 1 < steps) load(step + Tile::kStages - 1);
    copy_async_commit();
    const E* x = stages + step % Tile::kStages * stage + P::b_column(lane) + warp_c;
    const E* gy = stages + step % Tile::kStages * stage + p.halo * Tile::kPitchX + P::a_column(lane) + warp_d;
    if (taps.count == Tile::kTaps)
      multiply_step<Tile, true>(sums, x, gy, position_at, p.positions, tap_offset, taps.count, lane);
    else
      multiply_step<Tile, false>(sums, x, gy, position_at, p.positions, tap_offset, taps.count, lane);
  }

  const Sum squares = direct_epilogue<Tile>(p, sums, example, group, c0 + warp_c, d0 + warp_d, taps, lane);
  Sum* scratch = reinterpret_cast<Sum*>(shared + (int64_t(p.halo + 2 * p.positions + Tile::kTaps) * 4 + 7) / 8 * 8);
  const Sum total = block_sum<Tile::kThreads>(squares, scratch);
  if (threadIdx.x == 0) static_cast<Sum*>(p.partial)[number] = total;
}

// There is a block for each tile, and fewer where most examples are done already, so that not thousands have nothing to
// do.
template <class Tile, bool kVectors>
__global__ void __launch_bounds__(Tile::kThreads, 1) direct_norm_kernel(DirectNorm p) {
  ENGM_SHARED(unsigned char, shared);
  const int64_t all = p.geometry.n * p.tiles();
  // After a tile's last barrier only its warps' sums are read, which the next tile leaves alone until its own.
  for (int64_t number = blockIdx.x; number < all; number += gridDim.x)
    direct_norm_tile<Tile, kVectors>(p, number, shared);
}

}  // namespace engm::cuda
