// Lists the places of pixels, positions and taps in a zero-padded image.
#include "conv_shape.h"

namespace engm {

bool reads_patches(const Space& kernel, const Space& stride, const Space& padding, const Space& dilation,
                   int64_t groups) {
  for (int i = 0; i < 3; ++i)
    if (padding[i] != 0 || (kernel[i] > 1 && (stride[i] != kernel[i] || dilation[i] != 1))) return false;
  return groups == 1 && ConvShape::volume(kernel) > 1;
}

std::vector<int64_t> ConvShape::position_index() const {
  std::vector<int64_t> index;
  index.reserve(positions());
  for (int64_t z = 0; z < out[0]; ++z)
    for (int64_t y = 0; y < out[1]; ++y)
      for (int64_t x = 0; x < out[2]; ++x) index.push_back(padded_index(z * stride[0], y * stride[1], x * stride[2]));
  return index;
}

std::vector<int64_t> ConvShape::tap_index() const {
  std::vector<int64_t> index;
  index.reserve(taps());
  for (int64_t z = 0; z < kernel[0]; ++z)
    for (int64_t y = 0; y < kernel[1]; ++y)
      for (int64_t x = 0; x < kernel[2]; ++x)
        index.push_back(padded_index(z * dilation[0], y * dilation[1], x * dilation[2]));
  return index;
}

std::vector<int64_t> ConvShape::pixel_index() const {
  std::vector<int64_t> index;
  index.reserve(pixels());
  for (int64_t z = 0; z < in[0]; ++z)
    for (int64_t y = 0; y < in[1]; ++y)
      for (int64_t x = 0; x < in[2]; ++x) index.push_back(padded_index(z + padding[0], y + padding[1], x + padding[2]));
  return index;
}

}  // namespace engm
