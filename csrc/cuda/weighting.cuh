// out_k[i, e] = w_i in_k[i, e]   and   out_k[e] = Σ_i w_i in_k[i, e],   for many tensors k in one launch.
//
// in_k is [n, per_example] and dense, w is [n]. A tensor owns a run of blocks, which a block finds by bisection.
//   Scaling: a block owns 16 KB of a tensor, a thread four accesses of 16 bytes. Every element is read and written
//     once.
//   Sums: a block owns columns, as wide as 32 accesses; warp v adds the examples v, v + 8, …, eight of them under way at
//     once, and the eight sums are then added in order, so that every run gives the same bits. Every element is read
//     once. Without weights, w is 1.
// A weight of 0 times an infinity or NaN is NaN, as in any product.
// The bytes bound it: on an H200 scaling 570 MB ran at 93 % of a copy's speed. 40 sums of 5 MB, a microsecond's worth,
// took 72 µs at n = 128.
#pragma once

#include "pack.cuh"
#include "weighting.h"

namespace engm::cuda {

constexpr int kWeightingThreads = 256;
constexpr int kWeightingWarps = kWeightingThreads / 32;
constexpr int kScaleAccesses = 4, kSumAccesses = 8;
constexpr int kScaleTileBytes = kWeightingThreads * kScaleAccesses * 16;
constexpr int kSumsSharedBytes = kWeightingThreads * 8 * sizeof(float);

// How many columns a block owns: 32 lanes of 16 bytes.
inline int sum_columns(int element_bytes) { return 32 * 16 / element_bytes; }

// The tensor that a block works for: the last whose first block is not behind it.
inline __device__ int tensor_of(const WeightedTensors& all, int block) {
  int low = 0, high = all.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (all.first_block[middle] <= block)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Scales the tile that starts at element `begin`, which is element `offset` of an example; `weights` starts at that
// example.
template <typename T, typename W>
__device__ __forceinline__ void scale_tile(const WeightedTensor& t, const W* weights, int64_t begin, int64_t offset,
                                           int64_t left) {
  constexpr int kPack = 16 / sizeof(T), kTile = kScaleTileBytes / sizeof(T);
  const T* in = static_cast<const T*>(t.in) + begin;
  T* out = static_cast<T*>(t.out) + begin;
  // The weight of the tile's element e. At most one example ends within a tile that is shorter than an example.
  const auto weight_of = [&](int e) {
    const int64_t at = offset + e;
    return weights[t.per_example > kTile ? at >= t.per_example : uint32_t(at) / uint32_t(t.per_example)];
  };
  if (t.aligned) {
    Pack<T, kPack> packs[kScaleAccesses];
#pragma unroll
    for (int j = 0; j < kScaleAccesses; ++j) {
      const int e = (j * kWeightingThreads + int(threadIdx.x)) * kPack;
      if (e < left) packs[j] = load_pack<T, kPack>(in + e);
    }
#pragma unroll
    for (int j = 0; j < kScaleAccesses; ++j) {
      const int e = (j * kWeightingThreads + int(threadIdx.x)) * kPack;
      if (e >= left) continue;
      const W w = weight_of(e);  // kPack divides per_example: one example
#pragma unroll
      for (int k = 0; k < kPack; ++k) packs[j].at[k] = scaled(packs[j].at[k], w);
      store_pack(out + e, packs[j]);
    }
    return;
  }
#pragma unroll 4
  for (int e = threadIdx.x; e < kTile; e += kWeightingThreads)
    if (e < left) out[e] = scaled(in[e], weight_of(e));
}

template <typename W>
__global__ void __launch_bounds__(kWeightingThreads) scale_examples_kernel(WeightedTensors all) {
  const int k = tensor_of(all, blockIdx.x), tile = int(blockIdx.x) - all.first_block[k];
  const WeightedTensor t = all.tensor[k];
  const int64_t begin = int64_t(tile) * (kScaleTileBytes / bytes_of(t.element)), left = all.n * t.per_example - begin;
  const int64_t first = begin / t.per_example, offset = begin - first * t.per_example;
  const W* weights = static_cast<const W*>(all.weights) + first;
  switch (t.element) {
    case Element::kFloat32: scale_tile<float>(t, weights, begin, offset, left); break;
    case Element::kFloat64: scale_tile<double>(t, weights, begin, offset, left); break;
    case Element::kFloat16: scale_tile<Half>(t, weights, begin, offset, left); break;
    case Element::kBFloat16: scale_tile<Bf16>(t, weights, begin, offset, left); break;
  }
}

// `weights` is null where all are 1.
template <typename T, typename W>
__device__ __forceinline__ void sum_columns_of(const WeightedTensor& t, const W* weights, int64_t n, int slab,
                                               void* shared) {
  using Sum = typename SumOf<T>::Type;
  constexpr int kPack = 16 / sizeof(T), kColumns = 32 * kPack;
  static_assert(kWeightingWarps * kColumns * sizeof(Sum) <= kSumsSharedBytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t begin = int64_t(slab) * kColumns;
  const int columns = int(t.per_example - begin < kColumns ? t.per_example - begin : kColumns);
  const T* in = static_cast<const T*>(t.in) + begin;
  Sum sums[kPack] = {};
  const auto weight_of = [&](int64_t i) { return weights ? Sum(weights[i]) : Sum(1); };
  if (t.aligned) {  // a lane's columns are neighbours
    const T* from = in + (lane * kPack < columns ? lane * kPack : 0);  // lanes without columns read others' for nothing
    for (int64_t first = warp; first < n; first += kWeightingWarps * kSumAccesses) {
      Pack<T, kPack> packs[kSumAccesses];
      Sum w[kSumAccesses];
#pragma unroll
      for (int j = 0; j < kSumAccesses; ++j) {
        const int64_t i = first + j * kWeightingWarps;
        packs[j] = load_pack_or_zero<T, kPack>(from + (i < n ? i : first) * t.per_example, i < n);
        w[j] = i < n ? weight_of(i) : Sum(0);
      }
#pragma unroll
      for (int j = 0; j < kSumAccesses; ++j)
#pragma unroll
        for (int k = 0; k < kPack; ++k) sums[k] += w[j] * to_float(packs[j].at[k]);
    }
  } else {  // a warp's accesses are neighbours
#pragma unroll 2
    for (int64_t i = warp; i < n; i += kWeightingWarps) {
      const Sum w = weight_of(i);
#pragma unroll
      for (int k = 0; k < kPack; ++k)
        if (lane + 32 * k < columns) sums[k] += w * to_float(in[i * t.per_example + lane + 32 * k]);
    }
  }
  Sum* parts = static_cast<Sum*>(shared);  // [kWeightingWarps, kColumns]
#pragma unroll
  for (int k = 0; k < kPack; ++k) parts[warp * kColumns + (t.aligned ? lane * kPack + k : lane + 32 * k)] = sums[k];
  __syncthreads();
  const int column = threadIdx.x;
  if (column >= columns) return;
  Sum total = 0;
#pragma unroll
  for (int v = 0; v < kWeightingWarps; ++v) total += parts[v * kColumns + column];
  static_cast<Sum*>(t.out)[begin + column] = total;
}

template <typename W>
__global__ void __launch_bounds__(kWeightingThreads, 3) weighted_sums_kernel(WeightedTensors all) {
  ENGM_SHARED(unsigned char, shared);
  const int k = tensor_of(all, blockIdx.x), slab = int(blockIdx.x) - all.first_block[k];
  const WeightedTensor t = all.tensor[k];
  const W* weights = static_cast<const W*>(all.weights);
  switch (t.element) {
    case Element::kFloat32: sum_columns_of<float>(t, weights, all.n, slab, shared); break;
    case Element::kFloat64: sum_columns_of<double>(t, weights, all.n, slab, shared); break;
    case Element::kFloat16: sum_columns_of<Half>(t, weights, all.n, slab, shared); break;
    case Element::kBFloat16: sum_columns_of<Bf16>(t, weights, all.n, slab, shared); break;
  }
}

}  // namespace engm::cuda
