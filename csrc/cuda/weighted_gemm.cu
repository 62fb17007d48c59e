// Cuts the rows of weighted_gemm.cuh into splits and launches its two kernels.
#include "weighted_gemm.cuh"

#include "launch.cuh"

namespace engm::cuda {
namespace {

constexpr int64_t kEnoughBlocks = 132;  // one to a multiprocessor of an H100
constexpr int64_t kLeastSteps = 8;      // of a split

template <typename P>
int64_t tiles(int64_t p, int64_t d) {
  return ceil_div(p, GemmTile<P>::kTile) * ceil_div(d, GemmTile<P>::kTile);
}

template <typename P>
int launch_typed(const WeightedGemm& g, void* stream) {
  const int error = launch(weighted_gemm_kernel<P>, g.splits * tiles<P>(g.p, g.d), kGemmThreads,
                           GemmTile<P>::kSharedBytes, stream, g);
  if (error != 0 || g.splits == 1) return error;
  return launch(weighted_gemm_finish_kernel<typename P::Sum>, ceil_div(int64_t(g.d) * g.p, kGemmThreads), kGemmThreads,
                0, stream, g);
}

template <typename P>
int64_t splits(int64_t rows, int64_t p, int64_t d) {
  const int64_t steps = ceil_div(rows, GemmTile<P>::kStep), wanted = ceil_div(kEnoughBlocks, tiles<P>(p, d));
  const int64_t most = steps / kLeastSteps, taken = wanted < most ? wanted : most;
  return taken > 1 ? ceil_div(steps, ceil_div(steps, taken)) : 1;  // none of them empty
}

}  // namespace

int32_t weighted_gemm_splits(int64_t rows, int64_t p, int64_t d, Precision precision) {
  switch (precision) {
    case Precision::kTf32: return int32_t(splits<Tf32>(rows, p, d));
    case Precision::kBFloat16: return int32_t(splits<BFloat16>(rows, p, d));
    case Precision::kFloat16: return int32_t(splits<Float16>(rows, p, d));
    case Precision::kFloat64: return int32_t(splits<Float64>(rows, p, d));
    default: return int32_t(splits<Tf32x3>(rows, p, d));
  }
}

int launch_weighted_gemm(const WeightedGemm& g, Precision precision, void* stream) {
  switch (precision) {
    case Precision::kTf32: return launch_typed<Tf32>(g, stream);
    case Precision::kBFloat16: return launch_typed<BFloat16>(g, stream);
    case Precision::kFloat16: return launch_typed<Float16>(g, stream);
    case Precision::kFloat64: return launch_typed<Float64>(g, stream);
    default: return launch_typed<Tf32x3>(g, stream);
  }
}

}  // namespace engm::cuda
