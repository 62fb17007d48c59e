// Cuts the work of affine_norm.cuh into blocks and launches its two kernels.
#include "affine_norm.cuh"

#include "launch.cuh"

namespace engm::cuda {
namespace {

constexpr int64_t kEnoughBlocks = 512;   // about four to a multiprocessor
constexpr int64_t kLeastPositions = 64;  // of a part

int power_of_two(int64_t size, int least, int most) {
  int lanes = least;
  while (lanes < most && lanes < size) lanes *= 2;
  return lanes;
}

// Along channels: a warp's worth, more where there are too few positions to occupy the other threads.
int column_lanes(int64_t packs, int64_t positions) {
  int lanes = power_of_two(packs, 8, 32);
  while (lanes < kAffineThreads && lanes < packs && kAffineThreads / lanes > positions) lanes *= 2;
  return lanes;
}

template <typename T, int kPack>
int launch_both(const AffineNorm& p, void* stream) {
  using Sum = typename SumOf<T>::Type;
  int error = 0;
  if (p.channels_last) {
    const int64_t packs = ceil_div(p.channels, kPack);
    const AffineLaunch launched{p, column_lanes(packs, p.positions)};
    const int64_t blocks = p.n * p.parts_count * ceil_div(packs, launched.lanes);
    error = launch(affine_columns_kernel<T, kPack>, blocks, kAffineThreads, 2 * kAffineThreads * kPack * sizeof(Sum),
                   stream, launched);
  } else {
    const AffineLaunch launched{p, power_of_two(ceil_div(p.positions, kPack), 8, 32)};
    const int64_t blocks = ceil_div(p.n * p.channels, kAffineThreads / launched.lanes);
    error = launch(affine_rows_kernel<T, kPack>, blocks, kAffineThreads, 0, stream, launched);
  }
  if (error != 0) return error;
  return launch(affine_finish_kernel<Sum>, p.n, kAffineFinishThreads, 2 * kAffineFinishThreads / 32 * sizeof(double),
                stream, p);
}

template <typename T>
int launch_typed(const AffineNorm& p, void* stream) {
  return p.aligned ? launch_both<T, 16 / sizeof(T)>(p, stream) : launch_both<T, 1>(p, stream);
}

}  // namespace

int64_t affine_parts(int64_t n, int64_t channels, int64_t positions, Element element, bool channels_last) {
  if (!channels_last || n == 0) return 1;
  const int64_t packs = ceil_div(channels * bytes_of(element), 16);
  const int64_t blocks = n * ceil_div(packs, column_lanes(packs, positions));
  const int64_t wanted = ceil_div(kEnoughBlocks, blocks > 0 ? blocks : 1), most = positions / kLeastPositions;
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
