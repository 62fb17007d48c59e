// Compiles the inner loops for AVX-512 (F, BW, DQ, VL).
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define ENGM_ISA avx512
#define ENGM_ISA_NAME "avx512"
#define ENGM_VECTOR_BYTES 64
#define ENGM_ROWS 8
#define ENGM_VECTORS 3
#include "outer_product.inl"
#endif
