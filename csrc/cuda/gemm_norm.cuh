// Tiles of the direct form for one tap: linear layers and 1×1 convolutions; one gemm_norm_<precision>.cu instantiates each.
#pragma once

#include "direct_launch.cuh"

namespace engm::cuda {

// 128×128 gradients a block, each warp 32 channels × 64 rows; 64×64 where that pads less.
template <class P>
struct GemmTiles {
  using Wide = DirectTile<P, 128, 128, 4, 2, 1, 4>;
  using Small = DirectTile<P, 64, 64, 4, 2, 1, 4>;
  static constexpr int kPositions = 2 * P::kK;
};
template <>
struct GemmTiles<Float64> {
  using Wide = DirectTile<Float64, 64, 64, 4, 2, 1, 3>;
  using Small = DirectTile<Float64, 32, 32, 2, 2, 1, 3>;
  static constexpr int kPositions = 16;
};

template <class P>
bool plan_gemm(DirectNorm& p, int64_t limit) {
  using Wide = typename GemmTiles<P>::Wide;
  using Small = typename GemmTiles<P>::Small;
  const Geometry& g = p.geometry;
  constexpr double kSmallCost = 1.3;  // a gradient of a small tile against one of a wide: half the reuse
  const double wide = double(tiles_of(g.channels, Wide::kChannels)) * tiles_of(g.rows, Wide::kRows) * Wide::kChannels *
                      Wide::kRows;
  const double small = double(tiles_of(g.channels, Small::kChannels)) * tiles_of(g.rows, Small::kRows) *
                       Small::kChannels * Small::kRows;
  p.wide = wide <= kSmallCost * small;
  return p.wide ? plan_tile<Wide>(p, GemmTiles<P>::kPositions, limit)
                : plan_tile<Small>(p, GemmTiles<P>::kPositions, limit);
}

template <class P>
int run_gemm(const DirectNorm& p, void* stream) {
  return p.wide ? launch_tile<typename GemmTiles<P>::Wide>(p, stream)
                : launch_tile<typename GemmTiles<P>::Small>(p, stream);
}

}  // namespace engm::cuda
