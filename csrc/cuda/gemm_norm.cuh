// Chooses the tiles of the direct form for one tap, that is for linear layers and 1×1 convolutions:
//
//   ‖G_i‖²,  G_i[o, c] = Σ_t gy[i, o, t] x[i, c, t]        x [n, C, T], gy [n, d, T], any strides
//
// A block owns kChannels × kRows numbers of one example's G, as direct_norm.cuh says, and reads the T positions of its
// channels and rows once: x is read d / kRows times in all, gy C / kChannels times. Each gemm_norm_<precision>.cu
// instantiates one precision.
#pragma once

#include "direct_launch.cuh"

namespace engm::cuda {

// A wide tile is 128×128 numbers of the gradient, 32 channels × 64 rows a warp; a small one is 64×64, and pads less. One
// tap leaves the registers for two blocks on a multiprocessor, but for the operands of three products.
template <class P>
struct GemmTiles {
  using Wide = DirectTile<P, 128, 128, 4, 2, 1, 4, std::is_same_v<P, Tf32x3> ? 1 : 2>;
  using Small = DirectTile<P, 64, 64, 4, 2, 1, 4, 2>;
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
  constexpr double kSmallCost = 1.3;  // a number of a small tile takes that much longer, for it reuses half as much
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
