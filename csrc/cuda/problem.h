// Describes operands and convolutions for the norm kernels in plain numbers. No header of torch or of CUDA is needed,
// so that bindings and kernels compile apart.
#pragma once

#include <cstdint>

namespace engm::cuda {

// How products are formed. Sums are float, for kFloat64 double.
enum class Precision {
  kTf32,     // fp32 operands rounded to nearest TF32
  kFloat32,  // fp32 operands, three TF32 products each
  kBFloat16,
  kFloat16,
  kFloat64,
};

// A tensor [n, channels, z, y, x] with any strides, in elements. An example's slice has to be shorter than 2^31
// elements.
struct Operand {
  const void* data;
  int64_t example;
  int64_t channel;
  int64_t space[3];
};

// A convolution. Spatial values are z, y, x; with fewer dimensions the leading ones are 1 (padding 0). A linear layer
// is a convolution with kernel 1 over a line of T pixels.
struct Geometry {
  int64_t n;
  int groups;
  int channels;  // of one group of x
  int rows;      // of one group of gy
  int in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];

  constexpr int64_t positions() const { return int64_t(out[0]) * out[1] * out[2]; }  // T
  constexpr int64_t pixels() const { return int64_t(in[0]) * in[1] * in[2]; }
  constexpr int taps() const { return kernel[0] * kernel[1] * kernel[2]; }
};

}  // namespace engm::cuda
