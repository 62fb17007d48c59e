// Names the element types of those kernels that take any of them.
#pragma once

#include <cstdint>

namespace engm::cuda {

enum class Element : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

constexpr int bytes_of(Element element) {
  return element == Element::kFloat64 ? 8 : element == Element::kFloat32 ? 4 : 2;
}

}  // namespace engm::cuda
