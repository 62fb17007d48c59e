// Describes a convolution in plain numbers. A linear layer is a convolution with one tap over T pixels, and problems of
// one and two spatial dimensions are three-dimensional with leading sizes of 1.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace engm {

using Space = std::array<int64_t, 3>;

// Whether no two output positions of a convolution read the same pixel and none reads padding: patches side by side, as
// those that a vision transformer embeds, or with gaps along a dimension with one tap. With more than one tap and one
// group such a convolution is a linear layer over patches.
bool reads_patches(const Space& kernel, const Space& stride, const Space& padding, const Space& dilation,
                   int64_t groups);

struct ConvShape {
  int64_t n = 0, channels = 0, out_channels = 0, groups = 1;
  Space in{1, 1, 1}, out{1, 1, 1}, kernel{1, 1, 1}, stride{1, 1, 1}, padding{0, 0, 0}, dilation{1, 1, 1};

  static int64_t volume(const Space& s) { return s[0] * s[1] * s[2]; }
  int64_t positions() const { return volume(out); }  // T
  int64_t pixels() const { return volume(in); }
  int64_t taps() const { return volume(kernel); }
  Space padded() const {
    return {in[0] + 2 * padding[0], in[1] + 2 * padding[1], in[2] + 2 * padding[2]};
  }
  int64_t group_channels() const { return channels / groups; }
  int64_t group_rows() const { return out_channels / groups; }
  // The place of element (z, y, x) in the zero-padded image.
  int64_t padded_index(int64_t z, int64_t y, int64_t x) const {
    const Space p = padded();
    return (z * p[1] + y) * p[2] + x;
  }
  // The places of all pixels in the padded image, [pixels].
  std::vector<int64_t> pixel_index() const;
  // The places of the first tap at every output position, [T], and those of all taps relative to the first, [taps].
  std::vector<int64_t> position_index() const;
  std::vector<int64_t> tap_index() const;
};

}  // namespace engm
