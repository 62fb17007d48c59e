// What the matrix instructions compute from the fragments of all lanes; the layouts are stated in ptx.cuh.
//
// Products of TF32, bfloat16 and float16 are exact in float. Sums here are rounded to float one by one along k; the
// card adds the products of one mma together in an order and with a rounding of its own, so that float results agree to
// a few units in the last place only, and exactly where every partial sum is representable.
#pragma once

#include <cstdint>

#include "emulator.h"

namespace emulator {

struct LoadMatrixCall {
  uint32_t* registers;
  const void* row;
};

struct MmaCall {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

struct MmaDoubleCall {
  double* c;
  double a, b;
};

using Lanes = void* const[kLanes];

// lanes: LoadMatrixCall
void load_two(Lanes& lanes);
void load_two_transposed(Lanes& lanes);
void load_four(Lanes& lanes);
void load_four_transposed(Lanes& lanes);

// lanes: MmaCall
void multiply_tf32(Lanes& lanes);
void multiply_bf16(Lanes& lanes);
void multiply_fp16(Lanes& lanes);

// lanes: MmaDoubleCall
void multiply_f64(Lanes& lanes);

}  // namespace emulator
