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

// Fitted by engm.tune on an H200 to 72 layers in every precision (4×4 to 16×16 maps of 3 to 512 channels in both orders of
// memory, linear layers with T = 2 … 256). The faster form was taken in 93 to 99 % of them, and wrong picks lost at most
// 2.3 % of the time; by constants reasoned from data sheets it had been 62 to 71 %, and 32 to 65 %. Of the layers of
// ResNet-18, WRN-34-10 and VGG-8 at n = 128 wrong picks lost 0 to 5 %, and 10 to 43 % before. The unit, a FLOP of the
// direct form, is nearly free beside what a block does besides, so the numbers are large. Products are taken to cost 1.2
// times what was fitted in TF32, 1.33 in 16 bits and 1.75 in float32, as wide layers of T = 196 at n = 128 did. Other
// cards are taken to be alike until engm.tune has measured them.
CostTable builtin_cuda(Precision precision) {
  switch (precision) {  // in the order of the table's members
    case Precision::kTf32: return {410, 3530, 2780, 31, 3960, 998, 1130, 1.5e8, 5.76, 1980, 6.26e7, 64};
    case Precision::kFloat32: return {44.2, 164, 123, 3.58, 266, 60.1, 59.7, 9.56e6, 0.261, 586, 3.34e6, 64};
    case Precision::kBFloat16: return {1330, 5810, 4320, 20, 10000, 730, 5410, 5.08e8, 23.3, 4770, 2.03e8, 64};
    case Precision::kFloat16: return {1180, 5170, 3850, 21, 8710, 418, 4740, 4.51e8, 18.9, 4500, 1.84e8, 64};
    case Precision::kFloat64: return {13.9, 19.4, 11.2, 0.892, 61.3, 28.6, 10.8, 1.88e6, 0.123, 42.9, 4.44e5, 32};
  }
  return {};
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
