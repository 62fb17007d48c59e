// The Gram product of rows in global memory, on one block:  dst[m, n] = Σ_c u[m, c] v[n, c],  m, n < 128.
//
// u [rows_u, channels] and v [rows_v, channels] are read once each, u alone where both are the same. Rows are found
// through offsets (pixels of a halo are no neighbours); a row may also be zero. Chunks of channels go through a
// pipeline in shared memory, rows of channels whatever the layout in global memory: 16 bytes a copy where the channels
// are contiguous and aligned, else element by element. The warps share the product as squares of 32x32. Where there are
// more warps than squares, they take turns in the steps of the inner dimension, and their sums are added in a fixed
// order.
#pragma once

#include "mma.cuh"

namespace engm::cuda {

constexpr int kGramStages = 3;  // chunks in flight

__device__ __forceinline__ int round_up_16(int v) { return (v + 15) & ~15; }

// One Gram product on one block. With `diagonal` u is v, and only m ≤ n is formed.
template <typename P, int kThreads>
struct GramProduct {
  using E = typename P::Element;
  using Sum = typename P::Sum;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kTilesM = 32 / P::kM, kTilesN = 32 / P::kN;

  const E* src;  // channel 0 of the group in the example's slice
  int64_t channel;
  int channels;
  bool vectors, diagonal;
  const int* offset;  // shared, [2, tile_rows]
  E* stages;          // shared
  int tile_rows;
  int log_steps;
  Sum* dst;  // shared; may be where the stages are
  int dst_pitch;
  int rows_u, rows_v;

  __device__ __forceinline__ int depth() const { return P::kK << log_steps; }  // channels of a chunk
  __device__ __forceinline__ int pitch() const { return depth() + P::kPadOfM; }
  __device__ __forceinline__ E* tile(int chunk, int side) const {
    return stages + (chunk % kGramStages * (diagonal ? 1 : 2) + side) * tile_rows * pitch();
  }

  // Starts the copies of one chunk of channels, whole steps of them, zero where there are no more channels.
  __device__ __forceinline__ void load(int chunk) const {
    const int first = chunk * depth(), left = channels - first;
    const int width = min((left + P::kK - 1) / P::kK * P::kK, depth());
    for (int side = 0; side < (diagonal ? 1 : 2); ++side) {
      E* const to = tile(chunk, side);
      const int* const offset_of = offset + side * tile_rows;
      const int rows = round_up_16(side == 0 ? rows_u : rows_v);
      if (vectors)
        load_vectors(to, src + first, offset_of, rows, left, width);
      else
        load_elements(to, src + first * channel, offset_of, rows, left, width);
    }
  }

  __device__ __forceinline__ void load_vectors(E* to, const E* from, const int* offset_of, int rows, int left,
                                               int width) const {
    constexpr int kPiece = 16 / int(sizeof(E));
    constexpr int kLogPieces = 1;  // of a step
    static_assert(P::kK / kPiece == 1 << kLogPieces);
    const int log_pieces = log_steps + kLogPieces;
    for (int i = threadIdx.x; i < rows << log_pieces; i += kThreads) {
      const int row = i >> log_pieces, c = (i - (row << log_pieces)) * kPiece;
      if (c >= width) continue;
      const int at = offset_of[row], valid = at < 0 ? 0 : max(min(left - c, kPiece), 0);
      copy_async_16(to + row * pitch() + c, valid > 0 ? from + at + c : src, valid * int(sizeof(E)));
    }
  }

  // A warp takes 8 rows by 4 channels: neighbours in memory whether pixels or channels are, and in different banks.
  __device__ __forceinline__ void load_elements(E* to, const E* from, const int* offset_of, int rows, int left,
                                                int width) const {
    const int lane = threadIdx.x % 32, eights = rows / 8, end = eights * (width / 4);
    const int reciprocal = 65536 / eights + 1;  // good for quotients of i < 65536 / eights
    // There is no asynchronous copy of 2 bytes: these are loads in batches, so that some are under way, and then
    // stores.
    constexpr int kBatch = sizeof(E) == 2 ? 4 : 1;
#pragma unroll 1
    for (int first = threadIdx.x / 32; first < end; first += kBatch * kWarps) {
      E batch[kBatch];
      E* there[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int i = min(first + j * kWarps, end - 1);  // the last again where there are no more
        const int four = i * reciprocal >> 16, eight = i - four * eights;
        const int row = eight * 8 + lane % 8, c = four * 4 + lane / 8;
        const int at = offset_of[row];
        const bool valid = (at >= 0) & (c < left);
        const E* const source = valid ? from + c * channel + at : src;
        there[j] = to + row * pitch() + c;
        if constexpr (sizeof(E) == 2)
          batch[j] = *source;
        else
          copy_async_element<sizeof(E)>(there[j], source, valid);
        if (!valid) batch[j] = E{};
      }
      if constexpr (sizeof(E) == 2)
#pragma unroll
        for (int j = 0; j < kBatch; ++j) *there[j] = batch[j];
    }
  }

  // Forms the product, by all threads. The offsets have to be visible, and a barrier is needed before dst is read.
  __device__ __forceinline__ void form() const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int larger = max(rows_u, rows_v), log_side = larger <= 32 ? 0 : larger <= 64 ? 1 : 2;
    const int turns = kWarps >> 2 * log_side, turn = warp >> 2 * log_side;
    const int m0 = (warp >> log_side & ((1 << log_side) - 1)) * 32, n0 = (warp & ((1 << log_side) - 1)) * 32;
    // Which of the warp's tiles hold anything to form.
    uint32_t mine = 0;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int n = 0; n < kTilesN; ++n)
        if (m0 + m * P::kM < rows_u && n0 + n * P::kN < rows_v && !(diagonal && n0 + (n + 1) * P::kN <= m0 + m * P::kM))
          mine |= 1u << (m * kTilesN + n);
    Sum sums[kTilesM][kTilesN][P::kSums] = {};
    const int chunks = (channels + depth() - 1) / depth();
    for (int next = 0; next < chunks + kGramStages - 1; ++next) {
      const int chunk = next - (kGramStages - 1);
      if (chunk >= 0) {
        copy_async_wait<kGramStages - 2>();
        __syncthreads();  // the chunk is there for all, and all have left the stage that is filled next
      }
      if (next < chunks) load(next);
      copy_async_commit();
      if (chunk < 0) continue;
      const int steps = (min(channels - chunk * depth(), depth()) + P::kK - 1) / P::kK;
      const E* const u = tile(chunk, 0) + m0 * pitch();
      const E* const v = tile(chunk, diagonal ? 0 : 1) + n0 * pitch();
      for (int k = turn; k < steps; k += turns) step(u + k * P::kK, v + k * P::kK, mine, lane, sums);
    }
    store(sums, m0, n0, mine, turn, turns, lane);
  }

  __device__ __forceinline__ void step(const E* u, const E* v, uint32_t mine, int lane,
                                       Sum (&sums)[kTilesM][kTilesN][P::kSums]) const {
    constexpr uint32_t kRow = (1u << kTilesN) - 1, kColumn = ((1u << kTilesM * kTilesN) - 1) / kRow;
    typename P::A a[kTilesM];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
      if (mine & kRow << m * kTilesN) P::load_a_of_m(a[m], u + m * P::kM * pitch(), pitch(), lane);
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
      if (!(mine & kColumn << n)) continue;
      typename P::B b;
      P::load_b_of_n(b, v + n * P::kN * pitch(), pitch(), lane);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m)
        if (mine & 1u << (m * kTilesN + n)) P::mma(sums[m][n], a[m], b);
    }
  }

  // The warps that took turns add up one after the other.
  __device__ __forceinline__ void store(const Sum (&sums)[kTilesM][kTilesN][P::kSums], int m0, int n0, uint32_t mine,
                                        int turn, int turns, int lane) const {
    for (int now = 0; now < turns; ++now) {
      __syncthreads();  // before the first: all have read the stages
      if (now != turn) continue;
#pragma unroll
      for (int i = 0; i < kTilesM * kTilesN; ++i)
#pragma unroll
        for (int e = 0; e < P::kSums; ++e) {
          const int m = m0 + i / kTilesN * P::kM + P::sum_m(lane, e), n = n0 + i % kTilesN * P::kN + P::sum_n(lane, e);
          if (!(mine >> i & 1) || m >= rows_u || n >= rows_v) continue;
          Sum& to = dst[m * dst_pitch + n];
          const Sum sum = sums[i / kTilesN][i % kTilesN][e];
          to = now == 0 ? sum : to + sum;
        }
    }
  }
};

}  // namespace engm::cuda
