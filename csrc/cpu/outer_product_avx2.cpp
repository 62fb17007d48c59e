// Compiles the inner loops for AVX2 with FMA.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define ENGM_ISA avx2
#define ENGM_ISA_NAME "avx2"
#define ENGM_VECTOR_BYTES 32
#define ENGM_ROWS 4
#define ENGM_VECTORS 3
#include "outer_product.inl"
#endif
