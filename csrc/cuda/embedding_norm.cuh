// norm_sq[i] = Σ_v ‖Σ_{t: idx[i, t] = v} gy[i, t]‖²        idx [n, T], gy [n, T, d]
//
// There is no [V, d] buffer: the positions of one index form a chain.
//   embedding_link_kernel: a thread owns (i, t) and compares its index with all T of the example, T²·n compares. It
//     writes the next position of the same index, kLast at the end of a chain, and the flag kNotHead unless a chain
//     starts there.
//   embedding_sum_kernel: a block owns an example's slab of channels, as wide as 32 accesses; its warps take four
//     positions in turn, whose rows are under way at once, and add the rows of each chain that starts there in their
//     order. It reads every element of gy once, and the links once a slab.
// sum_partials.cu adds the slabs in order. Every run gives the same bits.
// The bytes of gy bound it: a copy of [128, 256, 768] in fp32 takes 24 µs on an H200, where warps that had the row of one
// chain's start under way took 62.
#pragma once

#include "embedding_norm.h"
#include "pack.cuh"
#include "reduce.cuh"

namespace engm::cuda {

constexpr int kEmbeddingThreads = 256;
constexpr int kRowsInFlight = 4;          // rows of a chain that are loaded before they are added
constexpr int32_t kLast = 0x3fffffff;     // no further position; T is smaller
constexpr int32_t kNotHead = 0x40000000;  // an earlier position has the same index, or it is padding

__host__ __device__ inline int64_t embedding_chunks(int64_t positions) {
  return (positions + kEmbeddingThreads - 1) / kEmbeddingThreads;
}

// A block owns a chunk of an example's positions, and takes all of the example through shared memory, as many at once.
__global__ void __launch_bounds__(kEmbeddingThreads) embedding_link_kernel(EmbeddingNorm p) {
  ENGM_SHARED(int64_t, tile);  // [kEmbeddingThreads]
  const int64_t chunks = embedding_chunks(p.positions), i = blockIdx.x / chunks;
  const int32_t positions = int32_t(p.positions), mine_at = int32_t(threadIdx.x);
  const int32_t t = int32_t(blockIdx.x % chunks) * kEmbeddingThreads + mine_at;
  const int64_t* indices = p.indices + i * p.positions;
  const int64_t mine = t < positions ? indices[t] : 0;
  bool head = p.padding_idx < 0 || mine != p.padding_idx;
  int32_t next = kLast;
  for (int32_t begin = 0; begin < positions; begin += kEmbeddingThreads) {
    const int32_t left = positions - begin, count = left < kEmbeddingThreads ? left : kEmbeddingThreads;
    __syncthreads();  // the tile before has been read
    if (mine_at < count) tile[mine_at] = indices[begin + mine_at];
    __syncthreads();
#pragma unroll 8
    for (int32_t at = 0; at < count; ++at) {
      const int32_t s = begin + at;
      const bool same = tile[at] == mine;
      head = head && !(same && s < t);
      next = same && s > t && next == kLast ? s : next;
    }
  }
  if (t < positions) p.next[i * p.positions + t] = next | (head ? 0 : kNotHead);
}

// A block owns (example, slab of channels), the slab going fastest.
template <typename T, int kPack>
__global__ void __launch_bounds__(kEmbeddingThreads, 2) embedding_sum_kernel(EmbeddingNorm p) {
  using Sum = typename SumOf<T>::Type;
  constexpr int kWarps = kEmbeddingThreads / 32;
  ENGM_SHARED(Sum, scratch);
  const int64_t slab = blockIdx.x % p.slabs, i = blockIdx.x / p.slabs;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c = (slab * 32 + lane) * kPack;
  Sum squares = 0;
  if (c < p.channels) {
    const T* gy = static_cast<const T*>(p.gy) + i * p.positions * p.channels + c;
    const int32_t* next = p.next + i * p.positions;
    for (int32_t begin = warp * kRowsInFlight; begin < p.positions; begin += kWarps * kRowsInFlight) {
      int32_t links[kRowsInFlight];
      Pack<T, kPack> heads[kRowsInFlight];
#pragma unroll
      for (int h = 0; h < kRowsInFlight; ++h) links[h] = begin + h < p.positions ? next[begin + h] : kNotHead;
#pragma unroll
      for (int h = 0; h < kRowsInFlight; ++h) {
        const bool is_head = !(links[h] & kNotHead);  // the first position's row stands for those that are not
        heads[h] = load_pack_or_zero<T, kPack>(gy + (is_head ? begin + h : begin) * p.channels, is_head);
      }
#pragma unroll
      for (int h = 0; h < kRowsInFlight; ++h) {
        if (links[h] & kNotHead) continue;
        Sum sum[kPack];
#pragma unroll
        for (int k = 0; k < kPack; ++k) sum[k] = to_float(heads[h].at[k]);
        for (int32_t s = links[h] & kLast; s != kLast;) {
          Pack<T, kPack> rows[kRowsInFlight];
          bool there[kRowsInFlight];
#pragma unroll
          for (int r = 0; r < kRowsInFlight; ++r) {
            there[r] = s != kLast;
            if (!there[r]) continue;
            rows[r] = load_pack<T, kPack>(gy + s * p.channels);
            s = next[s] & kLast;
          }
#pragma unroll
          for (int r = 0; r < kRowsInFlight; ++r) {
            if (!there[r]) continue;
#pragma unroll
            for (int k = 0; k < kPack; ++k) sum[k] += to_float(rows[r].at[k]);
          }
        }
#pragma unroll
        for (int k = 0; k < kPack; ++k) squares += sum[k] * sum[k];
      }
    }
  }
  squares = block_sum<kEmbeddingThreads>(squares, scratch);
  if (threadIdx.x == 0) static_cast<Sum*>(p.parts)[i * p.slabs + slab] = squares;
}

}  // namespace engm::cuda
