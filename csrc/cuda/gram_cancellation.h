// Says how far the terms of the Gram form may cancel before an example is handed back for the direct form.
//
// The Gram of rounded operands is in exact arithmetic the norm of the gradient formed from the same rounded operands,
// so that rounding operands costs what it costs the direct form. What Σ|terms| / ‖G‖² multiplies is the rounding of
// sums. A tensor core truncates: half a unit of 2^-23 on average, of a running sum that is on average half the final
// one. An inner dimension of 1024 (128 steps in TF32, 64 in 16 bits) takes 4e-6 or 2e-6 off each of the two Gram
// matrices. A ratio of 64 then costs a TF32 squared norm 5e-4, a quarter of its 2e-3 (1e-3 in the norm), and 512 a
// 16-bit one 2e-3, a fifth of its 1e-2. In three-product TF32 every step's sums are added outside the tensor core, to
// nearest: 64 costs 1e-5, half of a float's 2e-5. Double takes 4096, as on the CPU.
#pragma once

#include "problem.h"

namespace engm::cuda {

// The largest Σ|terms| / result that is relied on.
constexpr double gram_cancellation(Precision precision) {
  if (precision == Precision::kFloat64) return 4096;
  return precision == Precision::kBFloat16 || precision == Precision::kFloat16 ? 512 : 64;
}

}  // namespace engm::cuda
