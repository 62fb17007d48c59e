// The device half of csrc/cuda/ptx.cuh in plain C++: same names, same meaning, and checks that the card does not make.
#pragma once

#include <cstdint>

#include "cuda_words.h"
#include "emulated_rounding.h"
#include "emulator.h"
#include "warp_matrix.h"

namespace engm::cuda {

#define ENGM_SHARED(T, name) T* name = reinterpret_cast<T*>(::emulator::shared_memory())

using emulator::Site;

// ---- asynchronous copies ----

inline void copy_async_16(void* dst, const void* src, int bytes) { emulator::copy_async(dst, src, 16, bytes); }

template <int kBytes>
inline void copy_async_element(void* dst, const void* src, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8);
  emulator::copy_async(dst, src, kBytes, valid ? kBytes : 0);
}

template <int kBytes>
inline void copy_async_or_zero(void* dst, const void* src, int sign) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::copy_async(dst, src, kBytes, sign < 0 ? 0 : kBytes);
}

inline void copy_async_commit() { emulator::copy_async_commit(); }

template <int kPending>
inline void copy_async_wait() {
  emulator::copy_async_wait(kPending);
}

// ---- ldmatrix and mma ----

inline void load_matrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  emulator::LoadMatrixCall call{r, row};
  emulator::collective("load_matrix_x4", emulator::load_four, &call, site);
}
inline void load_matrix_x4_trans(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  emulator::LoadMatrixCall call{r, row};
  emulator::collective("load_matrix_x4_trans", emulator::load_four_transposed, &call, site);
}
inline void load_matrix_x2(uint32_t (&r)[2], const void* row, Site site = Site::here()) {
  emulator::LoadMatrixCall call{r, row};
  emulator::collective("load_matrix_x2", emulator::load_two, &call, site);
}
inline void load_matrix_x2_trans(uint32_t (&r)[2], const void* row, Site site = Site::here()) {
  emulator::LoadMatrixCall call{r, row};
  emulator::collective("load_matrix_x2_trans", emulator::load_two_transposed, &call, site);
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
  emulator::MmaCall call{c, a, b};
  emulator::collective("mma_tf32", emulator::multiply_tf32, &call, site);
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
  emulator::MmaCall call{c, a, b};
  emulator::collective("mma_bf16", emulator::multiply_bf16, &call, site);
}
inline void mma_fp16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
  emulator::MmaCall call{c, a, b};
  emulator::collective("mma_fp16", emulator::multiply_fp16, &call, site);
}
inline void mma_f64(double (&c)[2], double a, double b, Site site = Site::here()) {
  emulator::MmaDoubleCall call{c, a, b};
  emulator::collective("mma_f64", emulator::multiply_f64, &call, site);
}

// ---- shuffles ----

template <typename T>
struct ShuffleCall {
  T value, received;
  int mask;
};

template <typename T>
void exchange(void* const (&lanes)[emulator::kLanes]) {
  for (int lane = 0; lane < emulator::kLanes; ++lane) {
    ShuffleCall<T>& call = *static_cast<ShuffleCall<T>*>(lanes[lane]);
    call.received = static_cast<const ShuffleCall<T>*>(lanes[(lane ^ call.mask) & 31])->value;
  }
}

template <typename T>
inline T shuffle_xor(T v, int mask, Site site = Site::here()) {
  ShuffleCall<T> call{v, v, mask};
  emulator::collective("shuffle_xor", exchange<T>, &call, site);
  return call.received;
}

struct AnyCall {
  bool so, any;
};

inline void any_of(void* const (&lanes)[emulator::kLanes]) {
  bool any = false;
  for (void* lane : lanes) any |= static_cast<AnyCall*>(lane)->so;
  for (void* lane : lanes) static_cast<AnyCall*>(lane)->any = any;
}

inline bool any_lane(bool so, Site site = Site::here()) {
  AnyCall call{so, so};
  emulator::collective("any_lane", any_of, &call, site);
  return call.any;
}

}  // namespace engm::cuda
