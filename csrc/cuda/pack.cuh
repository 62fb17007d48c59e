// Loads and stores several elements at once, and names the type that sums over an element type are formed in.
#pragma once

#include "ptx.cuh"

namespace engm::cuda {

// The elements of one access of up to 16 bytes; its address must be a multiple of its size.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];
};

template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, kCount>*>(p);
}

// Loads a pack without a branch, or takes zeros where `there` is false; the address must be valid even then.
template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_pack_or_zero(const T* p, bool there) {
  Pack<T, kCount> pack = load_pack<T, kCount>(p);
  if constexpr (sizeof pack % 4 == 0) {
    uint32_t words[sizeof pack / 4];
    memcpy(words, &pack, sizeof pack);
#pragma unroll
    for (uint32_t& word : words) word = there ? word : 0;
    memcpy(&pack, words, sizeof pack);
    return pack;
  } else {
    return there ? pack : Pack<T, kCount>{};
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, kCount>& pack) {
  *reinterpret_cast<Pack<T, kCount>*>(p) = pack;
}

// Sums over doubles are double, all others float.
template <typename T>
struct SumOf {
  using Type = float;
};
template <>
struct SumOf<double> {
  using Type = double;
};

// The product v w, formed in float (double for double) and rounded once.
template <typename T, typename W>
__device__ __forceinline__ T scaled(T v, W w) {
  T out;
  from_float(to_float(v) * typename SumOf<T>::Type(w), out);
  return out;
}

}  // namespace engm::cuda
