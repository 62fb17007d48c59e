// Compiles the inner loops for any processor, with 16-byte vectors that the compiler maps to whatever the target has.
#include "kernels.h"

#define ENGM_ISA baseline
#define ENGM_ISA_NAME "baseline"
#define ENGM_VECTOR_BYTES 16
#define ENGM_ROWS 4
#define ENGM_VECTORS 2
#include "outer_product.inl"
