// Gram form of the squared norm of each example's weight gradient,
//
//   out[i] = Σ_groups Σ_{t,s} Q[t,s] Σ_tap P[pixel(t, tap), pixel(s, tap)],
//   pixel(t, tap) = t·stride + tap·dilation - padding,
//
// with Q = gy gyᵀ over the T output positions (summed over the rows of one group) and P = x xᵀ over pixels (summed over
// the channels of one group), zero outside the image; 1 to 3 spatial dimensions.
//
// x [n, groups·channels, in] and gy [n, groups·rows, out] have any strides.
//
// Positions are cut into bands, rectangles of at most 64. A block owns an example, a group and a pair of bands u ≤ v:
// what lies below the diagonal is counted by weighting what lies above twice. It forms Q [≤64, ≤64], then P [≤128,
// ≤128] of the pixels that the bands touch (halo included, chunk by chunk of the taps where not all fit), both with
// tensor cores and into shared memory (gram_product.cuh). Then every thread adds Q[t,s]·Σ_tap P for some of the pairs,
// finding rows and columns of P in tables; a tap outside the image points at a row or column of zeros.
//
// Bytes: with one band, x and gy are read once; with more, once for each pair that a band is in, mostly from L2. Two
// sums a pair are written.
//
// Cancellation is judged as gram_cancellation.h says.
#pragma once

#include "gram_norm.h"
#include "gram_product.cuh"
#include "reduce.cuh"

namespace engm::cuda {

constexpr int kGramPositions = 64;  // the most positions of one band
constexpr int kGramPixels = 128;    // the most pixels that one band touches

// A rectangle of positions, taps or pixels.
struct GramBox {
  int first[3], size[3];

  __device__ __forceinline__ int count() const { return size[0] * size[1] * size[2]; }
  // Makes this the box of part `index` of a grid of parts.
  __device__ __forceinline__ void set_part(int index, const int (&part)[3], const int (&parts)[3],
                                           const int (&whole)[3]) {
#pragma unroll
    for (int d = 2; d >= 0; --d) {
      first[d] = index % parts[d] * part[d];
      index /= parts[d];
      size[d] = min(part[d], whole[d] - first[d]);
    }
  }
  __device__ __forceinline__ void split(int i, int (&at)[3]) const {
    at[2] = i % size[2], i /= size[2];
    at[1] = i % size[1], at[0] = i / size[1];
  }
};

// One operand of a product: the positions of a band, or the pixels that they touch through a chunk of taps. Shared
// memory has one for u and one for v.
struct GramSide {
  GramBox band, taps, rows;
  bool apart[3];  // rows are (position, tap) along this axis, else coordinates
  int count;

  __device__ __forceinline__ void set_positions(const GramNorm& p, int index) {
    band.set_part(index, p.band, p.bands, p.geometry.out);
    rows = band;
    count = rows.count();
    for (int d = 0; d < 3; ++d) apart[d] = false;
  }

  __device__ __forceinline__ void set_pixels(const GramNorm& p, int index, int chunk) {
    const Geometry& g = p.geometry;
    band.set_part(index, p.band, p.bands, g.out);
    taps.set_part(chunk, p.taps, p.chunks, g.kernel);
    for (int d = 0; d < 3; ++d) {
      apart[d] = p.apart[d];
      const int low = band.first[d] * g.stride[d] + taps.first[d] * g.dilation[d] - g.padding[d];
      const int high = low + (band.size[d] - 1) * g.stride[d] + (taps.size[d] - 1) * g.dilation[d];
      rows.first[d] = max(low, 0);
      rows.size[d] = apart[d] ? band.size[d] * taps.size[d] : max(min(high, g.in[d] - 1) - rows.first[d] + 1, 0);
    }
    count = rows.count();
  }

  // Where row i lies in the example's slice of an operand of this extent, in elements; -1: it is zero.
  __device__ __forceinline__ int offset(const Geometry& g, const int64_t (&space)[3], const int (&extent)[3],
                                        int i) const {
    int at[3], total = 0;
    bool inside = i < count;
    rows.split(i, at);
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      int pixel = rows.first[d] + at[d];
      if (apart[d]) {
        const int t = at[d] / taps.size[d], tap = at[d] - t * taps.size[d];
        pixel = (band.first[d] + t) * g.stride[d] + (taps.first[d] + tap) * g.dilation[d] - g.padding[d];
      }
      inside = inside && pixel >= 0 && pixel < extent[d];
      total += pixel * int(space[d]);
    }
    return inside ? total : -1;
  }

  // The row of a position and a tap, both counted within their boxes; `count`, a row of zeros, if it has none.
  __device__ __forceinline__ int row(const Geometry& g, int position, int tap) const {
    int t[3], k[3], total = 0;
    band.split(position, t);
    taps.split(tap, k);
    bool inside = t[0] < band.size[0];
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      const int pixel = (band.first[d] + t[d]) * g.stride[d] + (taps.first[d] + k[d]) * g.dilation[d] - g.padding[d];
      const int at = apart[d] ? t[d] * taps.size[d] + k[d] : pixel - rows.first[d];
      inside = inside && at >= 0 && at < rows.size[d];
      total = total * rows.size[d] + at;
    }
    return inside ? total : count;
  }
};

// The offsets of four neighbouring rows of P.
struct alignas(8) GramRows {
  uint16_t r[4];
};

template <typename P, int kThreads>
struct GramBlock {
  using E = typename P::Element;
  using Sum = typename P::Sum;

  const GramNorm& p;
  const int u, v;  // bands
  const int64_t example;
  const int group;
  unsigned char* const shared;
  Sum total = 0, magnitude = 0;

  __device__ __forceinline__ GramSide* sides() const { return reinterpret_cast<GramSide*>(shared + p.side_at); }
  __device__ __forceinline__ int* offsets() const { return reinterpret_cast<int*>(shared + p.offset_at); }
  __device__ __forceinline__ Sum* q() const { return reinterpret_cast<Sum*>(shared + p.q_at); }
  __device__ __forceinline__ Sum* gram() const { return reinterpret_cast<Sum*>(shared); }
  // [taps, 64] of a chunk: offsets of rows of P for the positions of u, columns for those of v.
  __device__ __forceinline__ uint16_t* table(int side) const {
    return reinterpret_cast<uint16_t*>(shared + p.table_at) + side * p.taps[0] * p.taps[1] * p.taps[2] * kGramPositions;
  }

  // Forms Q, then P chunk by chunk of the taps, and after each chunk adds its part of the sum.
  __device__ __forceinline__ void run() {
    for (int pass = 0; pass <= p.chunks[0] * p.chunks[1] * p.chunks[2]; ++pass) {
      if (threadIdx.x < 2) {
        GramSide& side = sides()[threadIdx.x];
        const int band = threadIdx.x == 0 ? u : v;
        if (pass == 0)
          side.set_positions(p, band);
        else
          side.set_pixels(p, band, pass - 1);
      }
      __syncthreads();
      const int rows = sides()[0].count, columns = sides()[1].count;
      if (rows > 0 && columns > 0) {  // else there is padding alone
        fill_tables(pass);
        __syncthreads();
        form(pass, rows, columns);
        if (pass > 0) add(rows, columns);
      }
      __syncthreads();  // tables and P are used again
    }
  }

  __device__ __forceinline__ void fill_tables(int pass) const {
    const Geometry& g = p.geometry;
    for (int which = 0; which < 2; ++which) {
      const GramSide& side = sides()[which];
      for (int i = threadIdx.x; i < round_up_16(side.count); i += kThreads)
        offsets()[which * p.tile_rows + i] =
            pass == 0 ? side.offset(g, p.gy.space, g.out, i) : side.offset(g, p.x.space, g.in, i);
      if (pass == 0) continue;
      const int position = threadIdx.x % kGramPositions, taps = side.taps.count();
      for (int tap = threadIdx.x / kGramPositions; tap < taps; tap += kThreads / kGramPositions)
        table(which)[tap * kGramPositions + position] =
            uint16_t(side.row(g, position, tap) * (which == 0 ? p.gram_pitch : 1));
    }
  }

  __device__ __forceinline__ void form(int pass, int rows, int columns) const {
    const Operand& from = pass == 0 ? p.gy : p.x;
    GramProduct<P, kThreads> product;
    product.channels = pass == 0 ? p.geometry.rows : p.geometry.channels;
    product.channel = from.channel;
    product.src = static_cast<const E*>(from.data) + example * from.example +
                  int64_t(group) * product.channels * from.channel;
    product.vectors = pass == 0 ? p.gy_vectors : p.x_vectors, product.diagonal = u == v;
    product.offset = offsets();
    product.stages = reinterpret_cast<E*>(shared), product.tile_rows = p.tile_rows, product.log_steps = p.log_steps;
    product.dst = pass == 0 ? q() : gram(), product.dst_pitch = pass == 0 ? p.q_pitch : p.gram_pitch;
    product.rows_u = rows, product.rows_v = columns;
    product.form();
  }

  __device__ __forceinline__ void add(int rows, int columns) {
    for (int n = threadIdx.x; n <= columns; n += kThreads) gram()[rows * p.gram_pitch + n] = 0;
    for (int m = threadIdx.x; m < rows; m += kThreads) gram()[m * p.gram_pitch + columns] = 0;
    __syncthreads();
    contract(sides()[0].taps.count(), sides()[0].band.count(), sides()[1].band.count());
  }

  // A thread takes four positions t and one s at a time; neighbours in the warp have neighbouring s.
  __device__ __forceinline__ void contract(int taps, int rows, int columns) {
    const bool diagonal = u == v;
    for (int i = threadIdx.x; i < (rows + 3) / 4 * columns; i += kThreads) {
      const int four = i / columns, s = i - four * columns;
      if (diagonal && s < 4 * four) continue;
      Sum sums[4] = {};
      for (int tap = 0; tap < taps; ++tap) {
        const Sum* const column = gram() + table(1)[tap * kGramPositions + s];
        const GramRows row = reinterpret_cast<const GramRows*>(table(0) + tap * kGramPositions)[four];
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[j] += column[row.r[j]];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int t = 4 * four + j;
        if (t >= rows || (diagonal && t > s)) continue;
        const Sum term = q()[t * p.q_pitch + s] * sums[j] * Sum(diagonal && t == s ? 1 : 2);
        total += term;
        magnitude += fabs(term);
      }
    }
  }
};

// The grid is n · groups · pairs of bands, the example outermost. A block writes Σ and Σ|terms| of its pair to
// partial[i, group, pair].
template <typename P, int kThreads>
__global__ __launch_bounds__(kThreads) void gram_norm_kernel(GramNorm p) {
  ENGM_SHARED(unsigned char, shared);
  using Sum = typename P::Sum;
  const int of_groups = int(blockIdx.x / unsigned(p.tiles));
  int u = 0, v = int(blockIdx.x % unsigned(p.tiles));
  while (v >= p.band_count - u) v -= p.band_count - u, ++u;
  GramBlock<P, kThreads> block{p, u, u + v, of_groups / p.geometry.groups, of_groups % p.geometry.groups, shared};
  block.run();
  Sum* const scratch = reinterpret_cast<Sum*>(shared + p.scratch_at);
  const Sum total = block_sum<kThreads>(block.total, scratch);
  const Sum magnitude = block_sum<kThreads>(block.magnitude, scratch + kThreads / 32);
  if (threadIdx.x == 0) {
    Sum* const to = static_cast<Sum*>(p.partial) + 2 * int64_t(blockIdx.x);
    to[0] = total, to[1] = magnitude;
  }
}

constexpr int kGramFinishThreads = 128;

// A warp adds the partial sums of one example, in double and in a fixed order.
template <typename P>
__global__ __launch_bounds__(kGramFinishThreads) void gram_norm_finish_kernel(GramNorm p) {
  using Sum = typename P::Sum;
  const int lane = threadIdx.x % 32;
  const int64_t i = int64_t(blockIdx.x) * (kGramFinishThreads / 32) + threadIdx.x / 32;
  if (i >= p.geometry.n) return;
  const int64_t count = int64_t(p.geometry.groups) * p.tiles;
  const Sum* const partial = static_cast<const Sum*>(p.partial) + 2 * i * count;  // [groups, pairs, 2]
  double total = 0, magnitude = 0;
  for (int64_t j = lane; j < count; j += 32) total += partial[2 * j], magnitude += partial[2 * j + 1];
  total = warp_sum(total), magnitude = warp_sum(magnitude);
  if (lane != 0) return;
  // A sum that is not finite may have overflowed on the way, in P or in Q: the direct form tells.
  const bool finite = magnitude <= 1.7976931348623157e308;
  static_cast<Sum*>(p.out)[i] = Sum(total > 0 ? total : 0);
  p.reliable[i] = finite && !(magnitude > p.cancellation * total);
}

}  // namespace engm::cuda
