// Which form is cheaper, from shapes alone. Dispatch, the Python `explain` and the tests share this one source.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace engm {

enum class Form { kAuto, kDirect, kGram };

struct Cost {
  double direct_flops = 0;  // of one example
  double gram_flops = 0;
  double elements = 0;  // of both operands, read once
  Form form = Form::kDirect;
};

const char* form_name(Form form);

// A [T, p] and B [T, d] of one example.
Cost linear_cost(int64_t T, int64_t p, int64_t d);

// Spatial values are 3-d, leading ones for fewer dimensions.
Cost conv_cost(int64_t channels, int64_t out_channels, const std::array<int64_t, 3>& kernel,
               const std::array<int64_t, 3>& stride, const std::array<int64_t, 3>& padding,
               const std::array<int64_t, 3>& dilation, int64_t groups, const std::array<int64_t, 3>& input,
               const std::array<int64_t, 3>& output);

}  // namespace engm
