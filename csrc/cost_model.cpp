#include "cost_model.h"

namespace engm {
namespace {

// Time of either form in units of one FLOP of the direct form on long sums, fitted to one Cascade Lake core (4×4 to
// 20×20 maps of 16 to 256 channels, linear layers with T = 2 … 196; about 110 GFLOP/s):
// - a tile of the direct form costs as much again as kTileSteps of its T steps;
// - a FLOP of the Gram form costs kGramFlop: its products are small and its triangles ragged;
// - the Gram form copies, centres and copies again every element of its operands: kGramElement, about 2 ns;
// - a tap adds T²/2 numbers from cache: kTapFlops each.
constexpr double kTileSteps = 12, kGramFlop = 2, kGramElement = 250, kTapFlops = 8;

Form cheaper(const Cost& cost, double steps) {
  const double direct = cost.direct_flops * (1 + kTileSteps / steps);
  return kGramFlop * cost.gram_flops + kGramElement * cost.elements < direct ? Form::kGram : Form::kDirect;
}

double product(const std::array<int64_t, 3>& v) {
  return static_cast<double>(v[0]) * static_cast<double>(v[1]) * static_cast<double>(v[2]);
}

}  // namespace

const char* form_name(Form form) {
  return form == Form::kGram ? "gram" : form == Form::kDirect ? "direct" : "auto";
}

Cost linear_cost(int64_t T, int64_t p, int64_t d) {
  const double t = static_cast<double>(T), columns = static_cast<double>(p), rows = static_cast<double>(d);
  Cost cost;
  cost.direct_flops = 2 * t * columns * rows;
  // T = 1 is two dot products; else two symmetric products and their contraction.
  cost.gram_flops = T == 1 ? 2 * (columns + rows) : t * t * (columns + rows) + 2 * t * t;
  cost.elements = t * (columns + rows);
  cost.form = T == 1 ? Form::kGram : cheaper(cost, t);
  return cost;
}

Cost conv_cost(int64_t channels, int64_t out_channels, const std::array<int64_t, 3>& kernel,
               const std::array<int64_t, 3>& stride, const std::array<int64_t, 3>& padding,
               const std::array<int64_t, 3>& dilation, int64_t groups, const std::array<int64_t, 3>& input,
               const std::array<int64_t, 3>& output) {
  (void)dilation;
  (void)padding;
  const double t = product(output), taps = product(kernel), g = static_cast<double>(groups);
  // Pixels that no tap reads (a strided 1×1 convolution) are never touched.
  std::array<int64_t, 3> used = input;
  for (int i = 0; i < 3; ++i)
    if (kernel[i] == 1 && stride[i] > 1) used[i] = output[i];
  const double pixels = product(used), c = static_cast<double>(channels), d = static_cast<double>(out_channels);
  Cost cost;
  cost.direct_flops = 2 * t * taps * (c / g) * d;
  // Symmetric P and Q; every group has its own, and its own sum over taps.
  cost.gram_flops = pixels * pixels * c + t * t * d + g * t * t * (1 + taps * kTapFlops / 2);
  cost.elements = pixels * c + t * d;
  cost.form = cheaper(cost, t);
  return cost;
}

}  // namespace engm
