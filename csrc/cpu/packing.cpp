// Copies one example into the layouts that the inner loops read.
#include <algorithm>

#include "shape.h"

namespace engm::cpu {

template <typename T>
void pack_lanes(const Kernels<T>& k, const Operand<T>& from, const T* src, const Space& size, int64_t valid,
                int64_t width, const int64_t* index, T* dst) {
  // Dimensions that follow each other in memory become one long line.
  Space length = size;
  for (int i : {1, 0}) {
    const bool dense = length[2] > 0 && (size[i] == 1 || from.space[i] == length[2] * from.space[2]);
    if (!dense) break;
    length[2] *= size[i];
    length[i] = 1;
  }
  Lines<T> lines;
  lines.width = lines.pitch = width, lines.step = from.space[2], lines.steps = length[2];
  for (int64_t z = 0; z < length[0]; ++z)
    for (int64_t y = 0; y < length[1]; ++y) {
      const T* line = src + z * from.space[0] + y * from.space[1];
      for (int64_t l = 0; l < valid; ++l) lines.lane[l] = line + l * from.channel;
      const int64_t first = (z * length[1] + y) * length[2];
      lines.index = index ? index + first : nullptr;
      lines.dst = index ? dst : dst + first * width;
      k.interleave(lines);
    }
}

template <typename T>
void pack_rows(const Kernels<T>& k, const Operand<T>& from, const T* src, const Space& size, int64_t count, T* dst) {
  const int64_t padded = round_up(count, kRowQuantum), steps = ConvShape::volume(size);
  for (int64_t row = 0; row < padded;) {
    const int64_t width = padded - row >= k.rows ? k.rows : kRowQuantum;
    pack_lanes<T>(k, from, src + row * from.channel, size, std::min(width, count - row), width, nullptr,
                  dst + row * steps);
    row += width;
  }
}

#define ENGM_INSTANTIATE(T)                                                                                          \
  template void pack_lanes(const Kernels<T>&, const Operand<T>&, const T*, const Space&, int64_t, int64_t,           \
                           const int64_t*, T*);                                                                      \
  template void pack_rows(const Kernels<T>&, const Operand<T>&, const T*, const Space&, int64_t, T*);
ENGM_INSTANTIATE(float)
ENGM_INSTANTIATE(double)

}  // namespace engm::cpu
