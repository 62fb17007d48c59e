// Hands the blocks of weighting.cuh to the tensors of a list and launches them.
#include "weighting.cuh"

#include "launch.cuh"

namespace engm::cuda {
namespace {

// Hands every tensor its blocks and launches them all; `blocks_of` counts the blocks of one tensor.
template <typename BlocksOf>
int launch_all(void (*kernel)(WeightedTensors), WeightedTensors& all, int shared, void* stream, BlocksOf blocks_of) {
  static_assert(sizeof(WeightedTensors) <= 4096);
  int64_t blocks = 0;
  for (int k = 0; k < all.count; ++k) {
    all.first_block[k] = int32_t(blocks);  // launch() refuses grids that do not fit
    blocks += blocks_of(all.tensor[k]);
  }
  return launch(kernel, blocks, kWeightingThreads, shared, stream, all);
}

}  // namespace

int launch_scale_examples(WeightedTensors& all, void* stream) {
  const auto kernel = all.weights_are_double ? scale_examples_kernel<double> : scale_examples_kernel<float>;
  return launch_all(kernel, all, 0, stream, [&](const WeightedTensor& t) {
    return (all.n * t.per_example * bytes_of(t.element) + kScaleTileBytes - 1) / kScaleTileBytes;
  });
}

int launch_weighted_sums(WeightedTensors& all, void* stream) {
  const auto kernel = all.weights_are_double ? weighted_sums_kernel<double> : weighted_sums_kernel<float>;
  return launch_all(kernel, all, kSumsSharedBytes, stream, [](const WeightedTensor& t) {
    const int columns = sum_columns(bytes_of(t.element));
    return (t.per_example + columns - 1) / columns;
  });
}

}  // namespace engm::cuda
