// Entry points of test_fragments.py: single instructions with the caller's registers, the policies of mma.cuh as whole
// matrix products, and the rounding functions.
#include "exported.h"
#include "mma.cuh"

using namespace engm::cuda;

namespace {

struct Registers {
  const uint32_t *a, *b;  // [32, 4], [32, 2]
  float* c;               // [32, 4], added to
  int which;              // 0 tf32, 1 bf16, 2 fp16
};

void mma_kernel(Registers p) {
  const int lane = threadIdx.x;
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = p.a[4 * lane + i], c[i] = p.c[4 * lane + i];
  for (int i = 0; i < 2; ++i) b[i] = p.b[2 * lane + i];
  if (p.which == 0) mma_tf32(c, a, b);
  if (p.which == 1) mma_bf16(c, a, b);
  if (p.which == 2) mma_fp16(c, a, b);
  for (int i = 0; i < 4; ++i) p.c[4 * lane + i] = c[i];
}

struct DoubleRegisters {
  const double *a, *b;  // [32]
  double* c;            // [32, 2]
};

void mma_f64_kernel(DoubleRegisters p) {
  const int lane = threadIdx.x;
  double c[2] = {p.c[2 * lane], p.c[2 * lane + 1]};
  mma_f64(c, p.a[lane], p.b[lane]);
  p.c[2 * lane] = c[0], p.c[2 * lane + 1] = c[1];
}

struct LoadMatrix {
  const uint16_t* elements;  // copied to the start of shared memory
  const int32_t* rows;       // [32] in elements
  uint32_t* registers;       // [32, count]
  int length, count;
  bool transposed;
};

void load_matrix_kernel(LoadMatrix p) {
  ENGM_SHARED(uint16_t, shared);
  const int lane = threadIdx.x;
  for (int i = lane; i < p.length; i += 32) shared[i] = p.elements[i];
  __syncwarp();
  const uint16_t* row = shared + p.rows[lane];
  if (p.count == 4) {
    uint32_t r[4];
    if (p.transposed)
      load_matrix_x4_trans(r, row);
    else
      load_matrix_x4(r, row);
    for (int i = 0; i < 4; ++i) p.registers[4 * lane + i] = r[i];
  } else {
    uint32_t r[2];
    if (p.transposed)
      load_matrix_x2_trans(r, row);
    else
      load_matrix_x2(r, row);
    for (int i = 0; i < 2; ++i) p.registers[2 * lane + i] = r[i];
  }
}

// One warp: c[m, n] = Σ_k a[k, m] b[k, n] with m = 2 kM, n = 2 kN, k = 2 kK.
struct Product {
  const double *a, *b;         // [k, m], [k, n]
  double* c;                   // [m, n]
  const int32_t* row_of;       // [k] where row k lies in shared memory
  bool rows_of_k;              // else rows of m and n
};

void store(double v, double& out) { out = v; }
template <typename E>
void store(double v, E& out) {
  from_float(float(v), out);
}

template <class P>
void product_kernel(Product p) {
  using E = typename P::Element;
  constexpr int kM = 2 * P::kM, kN = 2 * P::kN, kK = 2 * P::kK;
  const int pitch_a = p.rows_of_k ? kM + P::kPad : kK + P::kPadOfM, pitch_b = p.rows_of_k ? kN + P::kPad : pitch_a;
  ENGM_SHARED(E, a);
  E* b = a + (p.rows_of_k ? kK : kM) * pitch_a;
  const int lane = threadIdx.x;
  for (int k = 0; k < kK; ++k) {
    for (int m = lane; m < kM; m += 32)
      store(p.a[k * kM + m], a[p.rows_of_k ? p.row_of[k] * pitch_a + m : m * pitch_a + k]);
    for (int n = lane; n < kN; n += 32)
      store(p.b[k * kN + n], b[p.rows_of_k ? p.row_of[k] * pitch_b + n : n * pitch_b + k]);
  }
  __syncwarp();
  for (int m0 = 0; m0 < kM; m0 += P::kM)
    for (int n0 = 0; n0 < kN; n0 += P::kN) {
      typename P::Sum c[P::kSums] = {};
      for (int k0 = 0; k0 < kK; k0 += P::kK) {
        typename P::A fa;
        typename P::B fb;
        if (p.rows_of_k) {
          int at_a[P::kRows], at_b[P::kRows];
          for (int j = 0; j < P::kRows; ++j) {
            at_a[j] = p.row_of[k0 + P::a_row(lane, j)] * pitch_a + P::a_column(lane);
            at_b[j] = p.row_of[k0 + P::b_row(lane, j)] * pitch_b + P::b_column(lane);
          }
          P::load_a(fa, a + m0, at_a);
          P::load_b(fb, b + n0, at_b);
        } else {
          P::load_a_of_m(fa, a + m0 * pitch_a + k0, pitch_a, lane);
          P::load_b_of_n(fb, b + n0 * pitch_b + k0, pitch_b, lane);
        }
        P::mma(c, fa, fb);
      }
      for (int e = 0; e < P::kSums; ++e) p.c[(m0 + P::sum_m(lane, e)) * kN + n0 + P::sum_n(lane, e)] = c[e];
    }
}

}  // namespace

ENGM_EXPORT const char* mma(const uint32_t* a, const uint32_t* b, float* c, int which) {
  return exported::run(mma_kernel, 1, 32, 0, Registers{a, b, c, which});
}
ENGM_EXPORT const char* mma_double(const double* a, const double* b, double* c) {
  return exported::run(mma_f64_kernel, 1, 32, 0, DoubleRegisters{a, b, c});
}
ENGM_EXPORT const char* load_matrix(const uint16_t* elements, const int32_t* rows, uint32_t* registers, int length,
                                    int count, bool transposed) {
  return exported::run(load_matrix_kernel, 1, 32, 2 * length,
                       LoadMatrix{elements, rows, registers, length, count, transposed});
}

ENGM_EXPORT const char* product(int precision, bool rows_of_k, const double* a, const double* b, const int32_t* row_of,
                                double* c) {
  const Product p{a, b, c, row_of, rows_of_k};
  switch (precision) {
    case 0: return exported::run(product_kernel<Tf32>, 1, 32, 16 << 10, p);
    case 1: return exported::run(product_kernel<Tf32x3>, 1, 32, 16 << 10, p);
    case 2: return exported::run(product_kernel<BFloat16>, 1, 32, 16 << 10, p);
    case 3: return exported::run(product_kernel<Float16>, 1, 32, 16 << 10, p);
    default: return exported::run(product_kernel<Float64>, 1, 32, 16 << 10, p);
  }
}

ENGM_EXPORT void round_to_half(const float* in, Half* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) from_float(in[i], out[i]);
}
ENGM_EXPORT void round_to_bfloat16(const float* in, Bf16* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) from_float(in[i], out[i]);
}
ENGM_EXPORT void widen_half(const Half* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i]);
}
ENGM_EXPORT void widen_bfloat16(const Bf16* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i]);
}
ENGM_EXPORT void round_to_tf32(const float* in, uint32_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_tf32(in[i]);
}
