// Says how a block of the direct form may copy an operand, by where its elements lie.
#pragma once

#include <cstdint>

#include "direct_norm.h"

namespace engm::cuda {

// 16 bytes at a time need neighbours in memory, and all their beginnings at multiples of 16 bytes. `size` are the
// lengths of the operand's dimensions in space, `element` its bytes.
inline Copies copies_of(const Operand& o, const int (&size)[3], int64_t n, int channels, int groups, int64_t element) {
  const int64_t vector = 16 / element;
  const auto aligned = [&](int64_t count, int64_t stride) { return count == 1 || stride % vector == 0; };
  if (reinterpret_cast<uintptr_t>(o.data) % 16 != 0 || !aligned(n, o.example)) return Copies::kElements;
  const bool slices = aligned(size[0], o.space[0]) && aligned(size[1], o.space[1]);
  if (o.channel == 1 && channels % vector == 0 && slices && aligned(size[2], o.space[2])) return Copies::kRows;
  const bool lines = slices && aligned(int64_t(channels) * groups, o.channel) && o.channel * element <= INT32_MAX;
  if (o.space[2] == 1 && size[2] % vector == 0 && lines && element <= 4) return Copies::kLines;
  return Copies::kElements;
}

}  // namespace engm::cuda
