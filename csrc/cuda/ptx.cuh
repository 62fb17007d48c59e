// Wraps everything that the kernels ask of the machine beyond plain CUDA C++, one documented function an instruction.
//
// With ENGM_EMULATOR the same names come from tests/emulator, where g++ compiles the kernels and the CPU runs them.
// Kernels therefore write no inline assembly, take shared memory through ENGM_SHARED only (nothing is `__shared__`
// otherwise) and are launched through launch.cuh.
#pragma once

#ifdef ENGM_EMULATOR
#include "emulated_ptx.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace engm::cuda {

// Declares `name`, the block's dynamic shared memory as an array of T, 128-byte aligned. A kernel uses it once.
#define ENGM_SHARED(T, name)                                         \
  extern __shared__ __align__(128) unsigned char engm_shared_raw[]; \
  T* name = reinterpret_cast<T*>(engm_shared_raw)

// 16-bit elements as they lie in memory.
struct Half {
  uint16_t bits;
};
struct Bf16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ double to_float(double v) { return v; }
__device__ __forceinline__ float to_float(Bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
__device__ __forceinline__ float to_float(Half v) {
  float f;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(f) : "h"(v.bits));
  return f;
}

// Converts to the type of `out`, rounding to nearest even.
__device__ __forceinline__ void from_float(float v, float& out) { out = v; }
__device__ __forceinline__ void from_float(double v, double& out) { out = v; }
__device__ __forceinline__ void from_float(float v, Half& out) { asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(out.bits) : "f"(v)); }
__device__ __forceinline__ void from_float(float v, Bf16& out) {
  asm("cvt.rn.bf16.f32 %0, %1;\n" : "=h"(out.bits) : "f"(v));
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes from global to shared memory, asynchronously: the first `bytes` (0 to 16) are copied, the rest is
// zero. Both addresses must be 16-byte aligned, and src must be a valid address even where bytes is 0.
__device__ __forceinline__ void copy_async_16(void* dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(dst)), "l"(src), "r"(bytes)
               : "memory");
}

// Copies one element of 4 or 8 bytes in the same way, or zero where `valid` is false.
template <int kBytes>
__device__ __forceinline__ void copy_async_element(void* dst, const void* src, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(dst)), "l"(src), "n"(kBytes),
               "r"(valid ? kBytes : 0)
               : "memory");
}

// Copies 4, 8 or 16 bytes in the same way, or zeros where `sign` is negative; src has to be a valid address even then.
template <int kBytes>
__device__ __forceinline__ void copy_async_or_zero(void* dst, const void* src, int sign) {
  if constexpr (kBytes == 16) {
    asm volatile("{.reg .pred none;\n setp.lt.s32 none, %2, 0;\n cp.async.cg.shared.global [%0], [%1], 16, none;}\n" ::"r"(
                     shared_address(dst)),
                 "l"(src), "r"(sign)
                 : "memory");
  } else {
    static_assert(kBytes == 4 || kBytes == 8);
    asm volatile("{.reg .pred none;\n setp.lt.s32 none, %3, 0;\n cp.async.ca.shared.global [%0], [%1], %2, none;}\n" ::"r"(
                     shared_address(dst)),
                 "l"(src), "n"(kBytes), "r"(sign)
                 : "memory");
  }
}

// Closes the thread's group of copies; a thread sees its own copies after copy_async_wait, others' after a barrier too.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Rounds to TF32, to nearest with ties away from zero (truncation would bias a squared norm by -1.4e-3).
__device__ __forceinline__ uint32_t to_tf32(float v) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(r) : "f"(v));
  return r;
}

// Loads 8x8 matrices of 16-bit elements from shared memory; lane l gives the address of row l % 8 of matrix l / 8 (16
// bytes, aligned) and gets the elements 2(l % 4), 2(l % 4) + 1 of row l / 4 of each; `trans`: of column l / 4.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// These load two matrices; the addresses of lanes 16 to 31 are not read.
__device__ __forceinline__ void load_matrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// c[16, 8] += a[16, 8] b[8, 8]. With g = lane / 4, t = lane % 4 a lane holds
//   a: (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4)    b: (t, g) (t + 4, g)    c: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c[16, 8] += a[16, 16] b[16, 8]; a register holds two elements that are neighbours along k, the first in the low half:
//   a: (g, 2t) (g + 8, 2t) (g, 2t + 8) (g + 8, 2t + 8)    b: (2t, g) (2t + 8, g)    c as above
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_fp16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c[8, 8] += a[8, 4] b[4, 8] in double; a lane holds a: (g, t)    b: (t, g)    c: (g, 2t) (g, 2t + 1)
__device__ __forceinline__ void mma_f64(double (&c)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};\n"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
}

// The value of the lane whose number differs by `mask`.
template <typename T>
__device__ __forceinline__ T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}

// Whether it is so for any lane of the warp.
__device__ __forceinline__ bool any_lane(bool so) { return __any_sync(0xffffffffu, so); }

}  // namespace engm::cuda

#endif
