// Answers from shapes alone which form of a norm is cheaper. The dispatch, `explain` in Python and the tests ask here.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "cuda/problem.h"

namespace engm {

enum class Form { kAuto, kDirect, kGram };

// What the parts of both forms cost on one device, in units of one FLOP of its direct form on long sums. Times are sums
// over parts, though some parts overlap: that keeps them linear in the constants, and so easy to fit (engm.tune).
struct CostTable {
  double tile_steps = 0;      // a tile of the direct form costs as much again as this many of its T steps
  double direct_element = 0;  // an element that a tile reads, of rows or of maps whose channels come first
  double direct_last_element = 0;  // the same of maps whose channels come last
  double gram_flop = 1;       // a FLOP of the Gram form
  double gram_element = 0;    // an element that a band of the Gram form reads, of rows or of maps, channels first
  double gram_last_element = 0;  // the same of maps, channels last
  double tap_flop = 0;        // one number added up in the sum over taps
  double gram_block = 0;      // one pair of bands of positions, whatever its size
  // The Gram form of linear layers on CUDA, whose products are ATen's.
  double product_flop = 0;     // a FLOP of a matrix product
  double product_element = 0;  // an element that is read or written, of the operands or of the Gram matrices
  double product_example = 0;  // an example, whatever its size: its share of the launches
  double tile = 0;            // edge of the direct form's tiles on CUDA, where partial ones cost as much as whole ones
};

struct Cost {
  double direct_flops = 0;  // of one example, without padding
  double gram_flops = 0;
  double elements = 0;  // of both operands, read once
  Form form = Form::kDirect;
  // What a table's constants multiply: FLOPs, FLOPs of one step, elements of either layout; FLOPs, elements of either
  // layout, numbers added, blocks, and FLOPs, elements and examples of matrix products.
  std::array<double, 4> direct_parts{};
  std::array<double, 8> gram_parts{};
  double direct_time = 0;  // in the table's unit
  double gram_time = 0;
};

const char* form_name(Form form);

// The tables in use on the CPU and on a CUDA device. The first use of a device asks the loader for a saved table.
CostTable cpu_table();
CostTable cuda_table(int device, cuda::Precision precision);

// What one example of a linear layer costs, whose factors are A [T, p] and B [T, d].
Cost linear_cost(int64_t T, int64_t p, int64_t d, const CostTable& table = cpu_table());

// What one example of a convolution costs, whose channels come last in memory or before the pixels. Spatial values are
// three-dimensional, with leading ones (padding 0) for fewer dimensions.
Cost conv_cost(int64_t channels, int64_t out_channels, const std::array<int64_t, 3>& kernel,
               const std::array<int64_t, 3>& stride, const std::array<int64_t, 3>& padding,
               const std::array<int64_t, 3>& dilation, int64_t groups, const std::array<int64_t, 3>& input,
               const std::array<int64_t, 3>& output, bool channels_last, const CostTable& table = cpu_table());

// A device is a CUDA device's index, or kCpuDevice, where precision makes no difference.
constexpr int kCpuDevice = -1;
CostTable builtin_table(int device, cuda::Precision precision);
CostTable table_in_use(int device, cuda::Precision precision);
// Sets the table of one precision, or of all if none is named. Operators that run at the same time take the old table
// or the new one.
void set_table(int device, std::optional<cuda::Precision> precision, const CostTable& table, const std::string& source);
// Where a device's table comes from: "built-in", or what set_table was told.
std::string table_source(int device);
// Forgets every table that was set, and asks the loader for saved ones again.
void reset_tables();
// Names the function that is called, without locks, when a device is first used.
void set_table_loader(void (*loader)(int device));

}  // namespace engm
