// Translates torch's names of element types, for the bindings.
#pragma once

#include <ATen/core/Tensor.h>

#include "element.h"

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

inline bool is_aligned_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace engm::cuda
