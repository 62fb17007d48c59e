// Cuts the work of correction.cuh into blocks and launches its kernels.
#include "correction.cuh"

#include "launch.cuh"

namespace engm::cuda {
namespace {

template <typename T, int kPack>
int launch_factors(const CorrectionFactors& p, void* stream) {
  const int64_t run = p.channels_last ? p.channels : p.positions, packs = p.channels * p.positions / kPack;
  const int in_run = run < kPack ? 1 : int(run / kPack);
  const int64_t blocks = ceil_div(packs, kCorrectionThreads * kFactorLoads<kPack>);
  const FactorsLaunch launched{p,
                               int(packs),
                               in_run,
                               kCorrectionThreads / in_run,
                               kCorrectionThreads % in_run,
                               blocks > 0 ? int(blocks) : 1};
  return launch(p.channels_last ? correction_factors_kernel<T, kPack, true> : correction_factors_kernel<T, kPack, false>,
                p.n * launched.blocks, kCorrectionThreads, 0, stream, launched);
}

template <typename T>
int launch_typed(const CorrectionFactors& p, void* stream) {
  return p.aligned ? launch_factors<T, 16 / sizeof(T)>(p, stream) : launch_factors<T, 1>(p, stream);
}

template <typename Sum>
int launch_sums(const PatchMean& p, void* stream) {
  const int64_t owned = (p.channels_last ? ceil_div(p.channels, 32) : p.channels) * p.geometry.taps();
  return launch(patch_mean_kernel<Sum>, ceil_div(owned, kCorrectionThreads / p.team), kCorrectionThreads,
                kCorrectionThreads * sizeof(Sum), stream, p);
}

}  // namespace

int launch_correction_factors(const CorrectionFactors& p, void* stream) {
  switch (p.element) {
    case Element::kFloat64: return launch_typed<double>(p, stream);
    case Element::kFloat16: return launch_typed<Half>(p, stream);
    case Element::kBFloat16: return launch_typed<Bf16>(p, stream);
    default: return launch_typed<float>(p, stream);
  }
}

int launch_patch_mean(PatchMean p, void* stream) {
  p.team = p.channels_last || p.geometry.positions() > 128 ? kCorrectionThreads : 32;
  return p.is_double ? launch_sums<double>(p, stream) : launch_sums<float>(p, stream);
}

}  // namespace engm::cuda
