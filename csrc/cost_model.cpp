// Counts what the direct and the Gram form of a norm do on one example, and weighs the counts by a device's constants.
//
// A count is of what the kernels of that device do: on the CPU nothing is padded, on CUDA tiles are whole, and the Gram
// form of convolutions cuts positions into bands. csrc/cuda/gram_norm.cu plans its bands itself; the plan here is a
// likeness of that one.
#include "cost_model.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "conv_shape.h"

namespace engm {
namespace {

using Sizes = std::array<int64_t, 3>;

double product(const Sizes& v) {
  return static_cast<double>(v[0]) * static_cast<double>(v[1]) * static_cast<double>(v[2]);
}

double tiles_of(double length, double tile) { return std::ceil(length / tile); }

// The length in whole fragments of the matrix instructions.
double padded(double length) { return 16 * tiles_of(length, 16); }

// One layer in plain numbers. A linear layer has one tap over a line of T pixels, and no sum over taps.
struct Layer {
  double channels, rows, groups;  // channels and rows of one group
  double added;                   // numbers that the sum over taps adds for an element of the Gram matrix
  bool channels_last = false, linear = false;
  Sizes kernel{1, 1, 1}, stride{1, 1, 1}, dilation{1, 1, 1}, in{1, 1, 1}, out{1, 1, 1};
  double positions() const { return product(out); }
  double taps() const { return product(kernel); }
  // Elements in the place of their layout.
  double first(double elements) const { return channels_last ? 0 : elements; }
  double last(double elements) const { return channels_last ? elements : 0; }
};

// On the CPU nothing is padded, every element is read once, and the operands of one example and group are one block.
void cpu_parts(const Layer& l, Cost& cost) {
  const double t = l.positions();
  cost.direct_parts = {cost.direct_flops, 2 * l.taps() * l.channels * l.rows * l.groups, l.first(cost.elements),
                       l.last(cost.elements)};
  const double added = l.groups * t * t * l.added / 2;  // of the upper triangle
  cost.gram_parts = {cost.gram_flops - added, l.first(cost.elements), l.last(cost.elements), added, l.groups, 0, 0, 0};
}

// On CUDA the direct form has the tiles of csrc/cuda/gemm_norm.cuh, conv_norm.cuh or depthwise_norm.cuh, supposing that
// shared memory suffices.
void cuda_direct_parts(const Layer& l, double tile, Cost& cost) {
  const double t = l.positions(), slice = static_cast<double>(l.kernel[1] * l.kernel[2]);
  if (l.channels == 1 && l.taps() > 1) {  // plain multiply-adds, at a third of the rate; x comes from L1 but for once
    constexpr double kSlow = 3;
    const double step = kSlow * 2 * 32 * tiles_of(l.groups * l.rows, 32) * l.taps();
    const double elements = cost.elements * tiles_of(l.taps(), 9);
    cost.direct_parts = {step * t, step, l.first(elements), l.last(elements)};
    return;
  }
  double channels = tile, rows = tile, taps = 1, slow = 1, halo = 1;
  const auto area = [&](double edge) { return tiles_of(l.channels, edge) * tiles_of(l.rows, edge) * edge * edge; };
  if (l.taps() == 1) {
    if (area(2 * tile) <= 1.3 * area(tile)) channels = rows = 2 * tile;
  } else {
    taps = std::min(slice, 9.0), halo = 1.7;  // pixels are read again at the borders of 4 x 16 positions
    if (6 * tiles_of(l.channels, tile) > tiles_of(l.channels, 8)) channels = 8, slow = tile / 8 / 6;
  }
  const double tiles = l.groups * tiles_of(l.channels, channels) * tiles_of(l.rows, rows) * tiles_of(slice, taps) *
                       static_cast<double>(l.kernel[0]);
  const double step = slow * 2 * tiles * channels * rows * taps;
  const double elements = tiles * (rows * t + channels * halo * product(l.in));
  cost.direct_parts = {step * padded(t), step, l.first(elements), l.last(elements)};
}

// Elements of the upper triangle of a matrix of bands, in fragments of 16 x 16.
double triangle(double bands, double band) {
  const double fragments = band / 16;
  return bands * (bands - 1) / 2 * band * band + bands * fragments * (fragments + 1) / 2 * 256;
}

// Counts one way to cut positions into bands. Every pair of bands is a block, which forms the products of its positions
// and those of the pixels that they touch (tap by tap where the pixels are too many), and adds numbers of the latter
// for every tap. Returns FLOPs, elements, numbers added and blocks.
std::array<double, 4> band_parts(const Layer& l, const Sizes& band, bool tap_by_tap) {
  double positions = 1, pixels = 1, bands = 1;
  for (int i = 0; i < 3; ++i) {
    const int64_t extent = (band[i] - 1) * l.stride[i] + (l.kernel[i] - 1) * l.dilation[i] + 1;
    positions *= static_cast<double>(band[i]);
    pixels *= static_cast<double>(tap_by_tap ? band[i] : std::min(extent, l.in[i]));
    bands *= std::ceil(static_cast<double>(l.out[i]) / static_cast<double>(band[i]));
  }
  const double infinity = std::numeric_limits<double>::infinity();
  if (pixels > 128) return {infinity, infinity, infinity, infinity};
  positions = padded(positions), pixels = padded(pixels);
  const double passes = tap_by_tap ? l.taps() : 1;
  const double of_positions = l.groups * triangle(bands, positions);
  const double of_pixels = l.groups * triangle(bands, pixels) * passes;
  return {2 * (of_positions * (padded(l.rows) + 1) + of_pixels * padded(l.channels)),
          l.groups * bands * bands * (positions * l.rows + passes * pixels * l.channels), of_positions * l.taps(),
          l.groups * bands * (bands + 1) / 2 * (2 + passes) / 3};
}

// The longest band of at most `most` that cuts `whole` into parts of about one size; 0 if there is none.
int64_t band_of(int64_t whole, int64_t most) {
  if (most < 1) return 0;
  const int64_t parts = (whole + most - 1) / most;
  return (whole + parts - 1) / parts;
}

// Takes the bands that csrc/cuda/gram_norm.cu would take, by weights like those of its plan, which no table changes.
void cuda_gram_parts(const Layer& l, Cost& cost) {
  double least = std::numeric_limits<double>::infinity();
  for (const bool tap_by_tap : {false, true}) {
    if (tap_by_tap && l.taps() == 1) break;
    for (int64_t z = band_of(l.out[0], 64); z > 0; z = band_of(l.out[0], z - 1))
      for (int64_t y = band_of(l.out[1], 64 / z); y > 0; y = band_of(l.out[1], y - 1))
        for (int64_t x = band_of(l.out[2], 64 / (z * y)); x > 0; x = band_of(l.out[2], x - 1)) {
          const std::array<double, 4> parts = band_parts(l, {z, y, x}, tap_by_tap);
          const double weight = parts[0] + 100 * parts[1] + 40 * parts[2] + 1.5e6 * parts[3];
          if (weight < least) {
            least = weight;
            cost.gram_parts = {parts[0], l.first(parts[1]), l.last(parts[1]), parts[2], parts[3], 0, 0, 0};
          }
          if (std::isfinite(weight)) break;  // shorter lines are no better
        }
  }
}

// The Gram form of a linear layer: whole matrix products of a library in tiles of 64, which write the two Gram
// matrices, and a kernel that reads half of them.
void product_parts(const Layer& l, Cost& cost) {
  const double t = l.positions(), edge = 64 * tiles_of(t, 64);
  cost.gram_parts = {0, 0, 0, 0, 0, 2 * edge * edge * (l.channels + l.rows), cost.elements + 3 * t * t, 1};
}

Cost layer_cost(const Layer& l, const CostTable& table) {
  const double t = l.positions(), pixels = product(l.in), g = l.groups;
  const double contraction = l.added > 0 ? 1 : 2;
  Cost cost;
  cost.direct_flops = 2 * t * l.taps() * l.channels * l.rows * g;
  // Two symmetric products; every group has its own, its own sum over taps and its own contraction.
  cost.gram_flops = g * (pixels * pixels * l.channels + t * t * (l.rows + contraction + l.added / 2));
  cost.elements = g * (pixels * l.channels + t * l.rows);
  if (t == 0) return cost;
  if (table.tile > 0) {
    cuda_direct_parts(l, table.tile, cost);
    if (l.linear)
      product_parts(l, cost);
    else
      cuda_gram_parts(l, cost);
  } else {
    cpu_parts(l, cost);
  }
  const auto& [steps, step, tile_elements, tile_last] = cost.direct_parts;
  const auto& [flops, band_elements, band_last, added, blocks, products, moved, examples] = cost.gram_parts;
  cost.direct_time = steps + table.tile_steps * step + table.direct_element * tile_elements +
                     table.direct_last_element * tile_last;
  cost.gram_time = table.gram_flop * flops + table.gram_element * band_elements + table.gram_last_element * band_last +
                   table.tap_flop * added + table.gram_block * blocks + table.product_flop * products +
                   table.product_element * moved + table.product_example * examples;
  cost.form = cost.gram_time < cost.direct_time ? Form::kGram : Form::kDirect;
  return cost;
}

}  // namespace

const char* form_name(Form form) {
  return form == Form::kGram ? "gram" : form == Form::kDirect ? "direct" : "auto";
}

Cost linear_cost(int64_t T, int64_t p, int64_t d, const CostTable& table) {
  Layer layer{static_cast<double>(p), static_cast<double>(d), 1, 0};
  layer.in = layer.out = {1, 1, T}, layer.linear = true;
  Cost cost = layer_cost(layer, table);
  if (T == 1) {  // two dot products, whatever the table says
    cost.gram_flops = 2 * static_cast<double>(p + d);
    cost.form = Form::kGram;
  }
  return cost;
}

Cost conv_cost(int64_t channels, int64_t out_channels, const Sizes& kernel, const Sizes& stride, const Sizes& padding,
               const Sizes& dilation, int64_t groups, const Sizes& input, const Sizes& output, bool channels_last,
               const CostTable& table) {
  // On CUDA patches side by side are copied and then rows of a linear layer; on a CPU that was measured to be no
  // faster.
  if (table.tile > 0 && reads_patches(kernel, stride, padding, dilation, groups))
    return linear_cost(ConvShape::volume(output), channels * ConvShape::volume(kernel), out_channels, table);
  const double g = static_cast<double>(groups);
  Layer layer{static_cast<double>(channels) / g, static_cast<double>(out_channels) / g, g, product(kernel),
              channels_last};
  layer.kernel = kernel, layer.stride = stride, layer.dilation = dilation, layer.in = input, layer.out = output;
  // Pixels that no tap reads (a strided 1×1 convolution) are never touched.
  for (int i = 0; i < 3; ++i)
    if (kernel[i] == 1 && stride[i] > 1) layer.in[i] = output[i], layer.stride[i] = 1;
  return layer_cost(layer, table);
}

}  // namespace engm
