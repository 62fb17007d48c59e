// Cuts the work of affine_norm.cuh into blocks and launches its kernels.
#include "affine_norm.cuh"

#include "launch.cuh"

namespace engm::cuda {
namespace {

constexpr int64_t kWantedBlocks = 128;   // about one to a multiprocessor
constexpr int64_t kLeastPositions = 32;  // of a part
constexpr int64_t kLeastChannels = kAffineWarps;

int power_of_two(int64_t size) {
  int lanes = 1;
  while (lanes < 32 && lanes < size) lanes *= 2;
  return lanes;
}

template <typename T, int kPack, Varying kVarying>
int launch_rows(const AffineNorm& p, void* stream) {
  constexpr int kLoads = kInFlight<kPack, kVarying>;
  const int64_t packs = ceil_div(p.positions, kPack);
  const bool along = packs >= 16;  // the fewer lanes own a row, the less is there to shuffle
  const AffineLaunch launched{p, ceil_div(p.channels, p.parts_count),
                              power_of_two(along ? ceil_div(packs, kLoads) : packs), along};
  return launch(affine_rows_kernel<T, kPack, kVarying>, p.n * p.parts_count, kAffineThreads,
                2 * kAffineWarps * sizeof(double), stream, launched);
}

template <typename T, int kPack, Varying kVarying>
int launch_columns(const AffineNorm& p, void* stream) {
  const int64_t packs = ceil_div(p.channels, kPack), lanes = ceil_div(packs, ceil_div(packs, kAffineThreads));
  const int64_t sums = 2 * (kAffineThreads / lanes) * lanes * kPack * sizeof(typename SumOf<T>::Type);
  const AffineLaunch launched{p, ceil_div(p.positions, p.parts_count), int(lanes), false};
  return launch(affine_columns_kernel<T, kPack, kVarying>, p.n * p.parts_count, kAffineThreads,
                2 * kAffineWarps * sizeof(double) + sums, stream, launched);
}

template <typename T>
int launch_typed(const AffineNorm& p, void* stream) {
  constexpr int kPack = 16 / sizeof(T);
  constexpr Varying kOverChannels = Varying::kOverChannels, kOverAll = Varying::kOverAll;
  const bool over_channels = p.mean.step[1] != 0 || p.rstd.step[1] != 0;
  const bool over_positions = p.mean.step[2] != 0 || p.rstd.step[2] != 0;
  const auto main = [&] {
    if (!p.channels_last)
      return over_positions ? launch_rows<T, 1, kOverAll>
             : p.aligned    ? launch_rows<T, kPack, kOverChannels>
                            : launch_rows<T, 1, kOverChannels>;
    if (!p.aligned || (over_channels && over_positions)) return launch_columns<T, 1, kOverAll>;
    return over_positions ? launch_columns<T, kPack, Varying::kOverPositions> : launch_columns<T, kPack, kOverChannels>;
  }();
  const int error = main(p, stream);
  if (error != 0 || p.parts_count == 1) return error;
  return launch(affine_finish_kernel<typename SumOf<T>::Type>, p.n, kAffineFinishThreads,
                2 * kAffineFinishThreads / 32 * sizeof(double), stream, p);
}

}  // namespace

int64_t affine_parts(int64_t n, int64_t channels, int64_t positions, bool channels_last) {
  if (n == 0 || 2 * n >= kWantedBlocks) return 1;  // half as many blocks have enough under way, and spare a kernel
  const int64_t most = channels_last ? positions / kLeastPositions : channels / kLeastChannels;
  const int64_t wanted = kWantedBlocks / n;
  return wanted < most ? wanted : most > 1 ? most : 1;
}

int launch_affine_norm(const AffineNorm& p, void* stream) {
  switch (p.element) {
    case Element::kFloat64: return launch_typed<double>(p, stream);
    case Element::kFloat16: return launch_typed<Half>(p, stream);
    case Element::kBFloat16: return launch_typed<Bf16>(p, stream);
    default: return launch_typed<float>(p, stream);
  }
}

}  // namespace engm::cuda
