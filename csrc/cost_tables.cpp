// Keeps the constants of every device: those that are built in, and those that Python sets at run time.
#include <algorithm>
#include <map>
#include <mutex>
#include <set>

#include "cost_model.h"

namespace engm {
namespace {

using cuda::Precision;

constexpr Precision kPrecisions[] = {Precision::kTf32, Precision::kFloat32, Precision::kBFloat16, Precision::kFloat16,
                                     Precision::kFloat64};

// The constants were fitted to one Cascade Lake core (4×4 to 20×20 maps of 16 to 256 channels, linear layers with
// T = 2 … 196; about 110 GFLOP/s). Products of the Gram form are small and its triangles ragged; it copies, centres and
// copies again every element of its operands, about 2 ns each, and 3 where channels come last; the sum over taps reads
// from cache. More threads divide the work of either form alike. benchmarks/cost_constants.py measures the constants
// anew.
CostTable builtin_cpu() {
  CostTable table;
  table.tile_steps = 12, table.gram_flop = 2, table.gram_element = 250, table.gram_last_element = 360;
  table.tap_flop = 16;
  return table;
}

// The constants of products are from times of an H200 at n = 128: of T = 196, 384 to 384 up to 768 to 3072, and T = 64,
// by torch.bmm and passes of torch's over its results. Per tile of 64 positions cuBLAS makes some 260 TFLOP/s in TF32,
// 390 in 16 bits and 47 in float32; memory moves 4.3 TB/s; and an example's share of the three launches more than the
// direct form has is taken for 80 ns, of 4.4 µs a launch. Against them stands what the direct form's unit takes there:
// 80 FLOPs a picosecond in TF32 on layers of these sizes, 185 in 16 bits and 32 in float32. Double, of which a large
// product makes 62 TFLOP/s, was not measured further: half of that is supposed for the direct form.
void set_products(CostTable& table, Precision precision) {
  double product = 262, unit = 80, bytes = 4;  // FLOPs a picosecond, of the products and of the direct form
  if (precision == Precision::kFloat32) product = 47, unit = 32;
  if (precision == Precision::kFloat64) product = 55, unit = 30, bytes = 8;
  if (precision == Precision::kBFloat16 || precision == Precision::kFloat16) product = 390, unit = 185, bytes = 2;
  constexpr double kBytesPerPicosecond = 4.3, kPicosecondsAnExample = 8e4;
  table.product_flop = unit / product;
  table.product_element = unit * bytes / kBytesPerPicosecond;
  table.product_example = unit * kPicosecondsAnExample;
}

// These constants are reasoned from data sheets and NOT measured. mma.sync at a third of the peak is about 700 TF32
// FLOPs a clock and multiprocessor of an H100 and 340 of an A100. In that time L2 brings it some 24 to 40 bytes (6 to
// 10 elements, 40 to 120 FLOPs each; half of it hidden behind the products in the direct form's pipeline) and shared
// memory serves 32 loads, of which a number added over taps takes one and a half with its offsets (15 to 33 FLOPs). A
// block of either form starts, fills its pipeline and adds up its warps' sums in about 1,500 clocks, most of them
// shared with another block: some 8 steps of a tile of the direct form, 7e5 FLOPs of the Gram form. Where channels come
// last the direct form executes half as many instructions again for a copy (tools/machine_code.py).
CostTable builtin_cuda(Precision precision) {
  double rate = 1, width = 4;  // FLOPs against TF32, bytes of an element
  if (precision == Precision::kFloat32) rate = 1.0 / 3;
  if (precision == Precision::kFloat64) rate = 1.0 / 8, width = 8;
  if (precision == Precision::kBFloat16 || precision == Precision::kFloat16) rate = 2, width = 2;
  CostTable table;
  table.tile = precision == Precision::kFloat64 ? 32 : 64;
  table.tile_steps = 8 * rate;
  table.direct_element = 40 * rate * width / 4, table.direct_last_element = 1.5 * table.direct_element;
  table.gram_flop = 1.5;  // short sums, little reuse of fragments
  table.gram_element = table.gram_last_element = 80 * rate * width / 4;
  table.tap_flop = 32 * rate * (precision == Precision::kFloat64 ? 2 : 1);  // the Gram matrix holds sums, not operands
  table.gram_block = 7e5 * rate;
  set_products(table, precision);
  return table;
}

struct Tables {
  std::mutex mutex;
  std::map<std::pair<int, Precision>, CostTable> set;
  std::map<int, std::string> sources;
  std::set<int> asked;  // devices whose saved table was looked for
  void (*loader)(int device) = nullptr;
};

Tables& tables() {
  static Tables all;
  return all;
}

Precision key(int device, Precision precision) { return device == kCpuDevice ? Precision::kFloat32 : precision; }

// The loader runs Python, which may wait for a thread that waits for the mutex: never call it with the mutex held.
void load_once(int device) {
  void (*loader)(int) = nullptr;
  {
    const std::lock_guard<std::mutex> lock(tables().mutex);
    if (tables().loader == nullptr || !tables().asked.insert(device).second) return;
    loader = tables().loader;
  }
  loader(device);
}

}  // namespace

CostTable builtin_table(int device, Precision precision) {
  return device == kCpuDevice ? builtin_cpu() : builtin_cuda(precision);
}

CostTable table_in_use(int device, Precision precision) {
  load_once(device);
  const std::lock_guard<std::mutex> lock(tables().mutex);
  const auto found = tables().set.find({device, key(device, precision)});
  return found == tables().set.end() ? builtin_table(device, precision) : found->second;
}

CostTable cpu_table() { return table_in_use(kCpuDevice, Precision::kFloat32); }
CostTable cuda_table(int device, Precision precision) { return table_in_use(std::max(device, 0), precision); }

void set_table(int device, std::optional<Precision> precision, const CostTable& table, const std::string& source) {
  const std::lock_guard<std::mutex> lock(tables().mutex);
  tables().asked.insert(device);
  tables().sources[device] = source;
  for (const Precision each : kPrecisions)
    if (!precision || each == *precision || device == kCpuDevice) tables().set[{device, key(device, each)}] = table;
}

std::string table_source(int device) {
  load_once(device);
  const std::lock_guard<std::mutex> lock(tables().mutex);
  const auto found = tables().sources.find(device);
  return found == tables().sources.end() ? "built-in" : found->second;
}

void reset_tables() {
  const std::lock_guard<std::mutex> lock(tables().mutex);
  tables().set.clear(), tables().sources.clear(), tables().asked.clear();
}

void set_table_loader(void (*loader)(int device)) {
  const std::lock_guard<std::mutex> lock(tables().mutex);
  tables().loader = loader;
}

}  // namespace engm
