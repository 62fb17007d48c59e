// Chooses the tiles of the direct form for convolutions with several taps:
//
//   ‖G_i‖²,  G_i[o, c, tap] = Σ_t gy[i, o, t] x[i, c, t·stride + tap·dilation - padding]
//
// x [n, C, in] and gy [n, d, out] have any strides. A block owns up to nine taps of kChannels × kRows numbers of one
// example's G, as direct_norm.cuh says; x is read once a tile of rows (with halos 1.4 times at 3×3), gy once a tile of
// channels. Each conv_norm_<precision>.cu instantiates one precision.
#pragma once

#include "direct_launch.cuh"

namespace engm::cuda {

// A wide tile holds all 9 taps of a 3×3 kernel for 64 channels × 64 rows, 8 channels a warp: 144 sums a thread, and one
// shared-memory read a matrix instruction. A narrow tile is for few channels (an image's three): 8 × 64 on two warps,
// 1.4 reads.
template <class P>
struct ConvTiles {
  using Wide = DirectTile<P, 64, 64, 8, 1, 9, 2>;
  using Narrow = DirectTile<P, 8, 64, 1, 2, 9, 2, 4>;
};
// Three products an element need no more reuse than half the channels give, and have no registers for more.
template <>
struct ConvTiles<Tf32x3> {
  using Wide = DirectTile<Tf32x3, 32, 64, 4, 2, 9, 2>;
  using Narrow = DirectTile<Tf32x3, 8, 64, 1, 2, 9, 2, 4>;
};
template <>
struct ConvTiles<Float64> {
  using Wide = DirectTile<Float64, 32, 32, 2, 4, 9, 2>;
  using Narrow = DirectTile<Float64, 8, 32, 1, 4, 9, 2, 4>;
};

// The most positions of one step.
template <class P>
constexpr int kConvPositions = 512 / int(sizeof(typename P::Element));

template <class P>
bool plan_conv(DirectNorm& p, int64_t limit) {
  using Wide = typename ConvTiles<P>::Wide;
  using Narrow = typename ConvTiles<P>::Narrow;
  // A narrow tile does an eighth of a wide one's work in about a sixth of its time.
  constexpr int kNarrowInWideTime = 3 * Wide::kChannels / Narrow::kChannels / 4;
  p.wide = kNarrowInWideTime * tiles_of(p.geometry.channels, Wide::kChannels) <=
           tiles_of(p.geometry.channels, Narrow::kChannels);
  if (p.wide && plan_tile<Wide>(p, kConvPositions<P>, limit)) return true;
  p.wide = false;  // also where a wide step does not fit: strides and dilations of dozens
  return plan_tile<Narrow>(p, kConvPositions<P>, limit);
}

template <class P>
int run_conv(const DirectNorm& p, void* stream) {
  return p.wide ? launch_tile<typename ConvTiles<P>::Wide>(p, stream)
                : launch_tile<typename ConvTiles<P>::Narrow>(p, stream);
}

}  // namespace engm::cuda
