// Translates torch's names of element types, for the bindings.
#pragma once

#include <ATen/core/Tensor.h>

#include "element.h"
#include "problem.h"

namespace engm::cuda {

// The element type of a tensor; compute_type() has refused all that are none.
inline Element element_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return Element::kFloat64;
    case at::kHalf: return Element::kFloat16;
    case at::kBFloat16: return Element::kBFloat16;
    default: return Element::kFloat32;
  }
}

// The precision of those kernels that compute in the type of their operands.
inline Precision precision_of_element(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return Precision::kFloat64;
    case at::kHalf: return Precision::kFloat16;
    case at::kBFloat16: return Precision::kBFloat16;
    default: return Precision::kFloat32;
  }
}

inline bool is_aligned_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace engm::cuda
