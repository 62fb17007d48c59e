// Cuts the work of correction.cuh into blocks and launches its kernels.
#include "correction.cuh"

#include "launch.cuh"

namespace engm::cuda {
namespace {

constexpr int64_t kBlocksEach = 8;  // of a multiprocessor's; as many as it runs at once

bool columns(const PatchMean& p) { return p.x.channel == 1 && p.channels > 1; }

int64_t patch_blocks(const PatchMean& p) {
  return ceil_div(p.geometry.taps(), kPatchTaps) * (columns(p) ? ceil_div(p.channels, 32) : p.channels);
}

template <typename T>
int launch_factors(const CorrectionFactors& p, void* stream) {
  const int64_t blocks = ceil_div(p.n * p.channels * (p.positions > 1 ? p.positions : 1), kCorrectionThreads);
  const int64_t most = kBlocksEach * p.multiprocessors;
  return launch(correction_factors_kernel<T>, blocks < most ? blocks : most, kCorrectionThreads, 0, stream, p);
}

template <typename T>
int launch_sums(const PatchMean& p, void* stream) {
  const int64_t each = int64_t(kPatchTaps) * kPatchWarps * sizeof(typename SumOf<T>::Type);
  return launch(columns(p) ? patch_columns_kernel<T> : patch_rows_kernel<T>, patch_blocks(p) * p.splits,
                kCorrectionThreads, columns(p) ? 32 * each : each, stream, p);
}

}  // namespace

int patch_splits(const PatchMean& p, int multiprocessors) {
  const int64_t wanted = ceil_div(2 * int64_t(multiprocessors), patch_blocks(p));
  return int(wanted < p.geometry.n ? wanted : p.geometry.n);
}

int launch_correction_factors(const CorrectionFactors& p, void* stream) {
  switch (p.element) {
    case Element::kFloat64: return launch_factors<double>(p, stream);
    case Element::kFloat16: return launch_factors<Half>(p, stream);
    case Element::kBFloat16: return launch_factors<Bf16>(p, stream);
    default: return launch_factors<float>(p, stream);
  }
}

int launch_patch_mean(const PatchMean& p, void* stream) {
  switch (p.element) {
    case Element::kFloat64: return launch_sums<double>(p, stream);
    case Element::kFloat16: return launch_sums<Half>(p, stream);
    case Element::kBFloat16: return launch_sums<Bf16>(p, stream);
    default: return launch_sums<float>(p, stream);
  }
}

}  // namespace engm::cuda
