// Forms one warp's matrix product, c[m, n] += Σ_k a[k, m] b[k, n], in each precision behind one face.
//
// Operands lie in shared memory either as rows of k (elements of m or n contiguous: the direct forms, where k is a
// position) or as rows of m or n (elements of k contiguous: the Gram form, where k is a channel). A lane reads kRows
// rows of its own; a_row(), b_row() and the columns say which, and the kernel turns them into offsets once a step:
//
//   int at[P::kRows];
//   for (j) at[j] = offset_of_row(P::a_row(lane, j)) + P::a_column(lane);        // in elements
//   P::load_a(a, base, at);    P::load_b(b, base, at);    P::mma(c, a, b);
//
// so that rows may lie anywhere: the taps of a convolution are other offsets into one image. Row pitches of a multiple
// of 32 (16 for double, 64 for 16-bit) elements plus kPad are free of bank conflicts.
//
//   Tf32      fp32 operands rounded to nearest TF32       16x8x8; Tf32InPlace: rounded in shared memory already
//   Tf32x3    fp32 operands as the sum of two TF32        16x8x8, three products; error about 2^-22
//   BFloat16, Float16                                     16x8x16
//   Float64                                               8x8x4
#pragma once

#include "ptx.cuh"

namespace engm::cuda {

// What TF32 and 16-bit products share: sum_m and sum_n say where sum e of a lane's four lies in the 16x8 tile.
struct Sixteen {
  using Sum = float;
  static constexpr int kM = 16, kN = 8, kSums = 4;
  static constexpr bool kRoundOnArrival = false;
  static __device__ __forceinline__ int sum_m(int lane, int e) { return (lane >> 2) + 8 * (e >> 1); }
  static __device__ __forceinline__ int sum_n(int lane, int e) { return 2 * (lane & 3) + (e & 1); }
};

struct Tf32 : Sixteen {
  using Element = float;
  static constexpr int kK = 8, kRows = 2, kPad = 8;     // kPad is for rows of k
  static constexpr int kPadOfM = 4;                      // kPadOfM is for rows of m or n
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[2];
  };
  static __device__ __forceinline__ int a_row(int lane, int j) { return (lane & 3) + 4 * j; }
  static __device__ __forceinline__ int b_row(int lane, int j) { return (lane & 3) + 4 * j; }
  static __device__ __forceinline__ int a_column(int lane) { return lane >> 2; }
  static __device__ __forceinline__ int b_column(int lane) { return lane >> 2; }
  static __device__ __forceinline__ void load_a(A& a, const float* base, const int (&at)[kRows]) {
    a.r[0] = to_tf32(base[at[0]]), a.r[1] = to_tf32(base[at[0] + 8]);
    a.r[2] = to_tf32(base[at[1]]), a.r[3] = to_tf32(base[at[1] + 8]);
  }
  static __device__ __forceinline__ void load_b(B& b, const float* base, const int (&at)[kRows]) {
    b.r[0] = to_tf32(base[at[0]]), b.r[1] = to_tf32(base[at[1]]);
  }
  // These load from rows of m (n): `base` is element (0, 0) of the 16x8 (8x8) operand, `pitch` the distance of rows.
  static __device__ __forceinline__ void load_a_of_m(A& a, const float* base, int pitch, int lane) {
    const float* p = base + (lane >> 2) * pitch + (lane & 3);
    a.r[0] = to_tf32(p[0]), a.r[1] = to_tf32(p[8 * pitch]), a.r[2] = to_tf32(p[4]), a.r[3] = to_tf32(p[8 * pitch + 4]);
  }
  static __device__ __forceinline__ void load_b_of_n(B& b, const float* base, int pitch, int lane) {
    const float* p = base + (lane >> 2) * pitch + (lane & 3);
    b.r[0] = to_tf32(p[0]), b.r[1] = to_tf32(p[4]);
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const A& a, const B& b) { mma_tf32(c, a.r, b.r); }
};

// Tf32 for operands that were rounded where they lie: a fragment is a plain load. Where many fragments read every
// element, this saves two instructions a read.
struct Tf32InPlace : Tf32 {
  static constexpr bool kRoundOnArrival = true;
  static __device__ __forceinline__ void load_a(A& a, const float* base, const int (&at)[kRows]) {
    a.r[0] = __float_as_uint(base[at[0]]), a.r[1] = __float_as_uint(base[at[0] + 8]);
    a.r[2] = __float_as_uint(base[at[1]]), a.r[3] = __float_as_uint(base[at[1] + 8]);
  }
  static __device__ __forceinline__ void load_b(B& b, const float* base, const int (&at)[kRows]) {
    b.r[0] = __float_as_uint(base[at[0]]), b.r[1] = __float_as_uint(base[at[1]]);
  }
};

struct Tf32x3 : Sixteen {
  using Element = float;
  static constexpr int kK = 8, kRows = 2, kPad = 8, kPadOfM = 4;
  struct A {
    uint32_t high[4], low[4];
  };
  struct B {
    uint32_t high[2], low[2];
  };
  static __device__ __forceinline__ int a_row(int lane, int j) { return (lane & 3) + 4 * j; }
  static __device__ __forceinline__ int b_row(int lane, int j) { return (lane & 3) + 4 * j; }
  static __device__ __forceinline__ int a_column(int lane) { return lane >> 2; }
  static __device__ __forceinline__ int b_column(int lane) { return lane >> 2; }
  // An infinite value keeps its product infinite or NaN: its low part is NaN.
  static __device__ __forceinline__ void split(float v, uint32_t& high, uint32_t& low) {
    high = to_tf32(v);
    low = to_tf32(v - __uint_as_float(high));
  }
  static __device__ __forceinline__ void load_a(A& a, const float* base, const int (&at)[kRows]) {
    split(base[at[0]], a.high[0], a.low[0]), split(base[at[0] + 8], a.high[1], a.low[1]);
    split(base[at[1]], a.high[2], a.low[2]), split(base[at[1] + 8], a.high[3], a.low[3]);
  }
  static __device__ __forceinline__ void load_b(B& b, const float* base, const int (&at)[kRows]) {
    split(base[at[0]], b.high[0], b.low[0]), split(base[at[1]], b.high[1], b.low[1]);
  }
  static __device__ __forceinline__ void load_a_of_m(A& a, const float* base, int pitch, int lane) {
    const float* p = base + (lane >> 2) * pitch + (lane & 3);
    split(p[0], a.high[0], a.low[0]), split(p[8 * pitch], a.high[1], a.low[1]);
    split(p[4], a.high[2], a.low[2]), split(p[8 * pitch + 4], a.high[3], a.low[3]);
  }
  static __device__ __forceinline__ void load_b_of_n(B& b, const float* base, int pitch, int lane) {
    const float* p = base + (lane >> 2) * pitch + (lane & 3);
    split(p[0], b.high[0], b.low[0]), split(p[4], b.high[1], b.low[1]);
  }
  // The small products come first. Steps are added up outside the tensor core, to nearest: inside, every addition
  // truncates, half a unit of 2^-23 of the running sum on average, which a thousand steps of 8 positions would turn
  // into 4e-5.
  static __device__ __forceinline__ void mma(float (&c)[4], const A& a, const B& b) {
    float step[4] = {};
    mma_tf32(step, a.low, b.high);
    mma_tf32(step, a.high, b.low);
    mma_tf32(step, a.high, b.high);
#pragma unroll
    for (int e = 0; e < 4; ++e) c[e] += step[e];
  }
};

// 16-bit elements go through ldmatrix, for which a lane gives the address of one row.
template <typename E>
struct SixteenBit : Sixteen {
  using Element = E;
  static constexpr int kK = 16, kRows = 1, kPad = 8, kPadOfM = 8;
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[2];
  };
  static __device__ __forceinline__ int a_row(int lane, int) { return (lane & 7) + 8 * (lane >> 4); }
  static __device__ __forceinline__ int b_row(int lane, int) { return lane & 15; }
  static __device__ __forceinline__ int a_column(int lane) { return 8 * ((lane >> 3) & 1); }
  static __device__ __forceinline__ int b_column(int) { return 0; }
  static __device__ __forceinline__ void load_a(A& a, const E* base, const int (&at)[kRows]) {
    load_matrix_x4_trans(a.r, base + at[0]);
  }
  static __device__ __forceinline__ void load_b(B& b, const E* base, const int (&at)[kRows]) {
    load_matrix_x2_trans(b.r, base + at[0]);
  }
  static __device__ __forceinline__ void load_a_of_m(A& a, const E* base, int pitch, int lane) {
    load_matrix_x4(a.r, base + (lane & 15) * pitch + 8 * (lane >> 4));
  }
  static __device__ __forceinline__ void load_b_of_n(B& b, const E* base, int pitch, int lane) {
    load_matrix_x2(b.r, base + (lane & 7) * pitch + 8 * ((lane >> 3) & 1));
  }
};

struct BFloat16 : SixteenBit<Bf16> {
  static __device__ __forceinline__ void mma(float (&c)[4], const A& a, const B& b) { mma_bf16(c, a.r, b.r); }
};

struct Float16 : SixteenBit<Half> {
  static __device__ __forceinline__ void mma(float (&c)[4], const A& a, const B& b) { mma_fp16(c, a.r, b.r); }
};

struct Float64 {
  using Element = double;
  using Sum = double;
  static constexpr bool kRoundOnArrival = false;
  static constexpr int kM = 8, kN = 8, kK = 4, kSums = 2, kRows = 1, kPad = 4, kPadOfM = 4;
  struct A {
    double r;
  };
  struct B {
    double r;
  };
  static __device__ __forceinline__ int sum_m(int lane, int) { return lane >> 2; }
  static __device__ __forceinline__ int sum_n(int lane, int e) { return 2 * (lane & 3) + e; }
  static __device__ __forceinline__ int a_row(int lane, int) { return lane & 3; }
  static __device__ __forceinline__ int b_row(int lane, int) { return lane & 3; }
  static __device__ __forceinline__ int a_column(int lane) { return lane >> 2; }
  static __device__ __forceinline__ int b_column(int lane) { return lane >> 2; }
  static __device__ __forceinline__ void load_a(A& a, const double* base, const int (&at)[kRows]) { a.r = base[at[0]]; }
  static __device__ __forceinline__ void load_b(B& b, const double* base, const int (&at)[kRows]) { b.r = base[at[0]]; }
  static __device__ __forceinline__ void load_a_of_m(A& a, const double* base, int pitch, int lane) {
    a.r = base[(lane >> 2) * pitch + (lane & 3)];
  }
  static __device__ __forceinline__ void load_b_of_n(B& b, const double* base, int pitch, int lane) {
    b.r = base[(lane >> 2) * pitch + (lane & 3)];
  }
  static __device__ __forceinline__ void mma(double (&c)[2], const A& a, const B& b) { mma_f64(c, a.r, b.r); }
};

}  // namespace engm::cuda
