// Launches depthwise_norm.cuh for each element type and order of memory.
#include "depthwise_norm.cuh"

#include "launch.cuh"

namespace engm::cuda {
namespace {

template <typename E>
int run(const DirectNorm& p, void* stream) {
  const int64_t blocks = p.geometry.n * depthwise_tiles(p.geometry);
  const int64_t shared = DepthwiseTile::kShared * sizeof(typename SumOf<E>::Type);
  return p.x.channel == 1 && p.gy.channel == 1
             ? launch(depthwise_norm_kernel<E, true>, blocks, DepthwiseTile::kThreads, shared, stream, p)
             : launch(depthwise_norm_kernel<E, false>, blocks, DepthwiseTile::kThreads, shared, stream, p);
}

}  // namespace

int launch_depthwise_norm(const DirectNorm& p, Precision precision, void* stream) {
  switch (precision) {
    case Precision::kTf32:
    case Precision::kFloat32: return run<float>(p, stream);
    case Precision::kBFloat16: return run<Bf16>(p, stream);
    case Precision::kFloat16: return run<Half>(p, stream);
    case Precision::kFloat64: return run<double>(p, stream);
  }
  return 1;
}

}  // namespace engm::cuda
