// Tiles of the direct form for kernels of several taps; one conv_norm_<precision>.cu instantiates each.
#pragma once

#include "direct_launch.cuh"

namespace engm::cuda {

// All 9 taps of a 3×3 kernel for 64 channels × 64 rows: 144 sums a thread, and 1.2 shared-memory reads a matrix
// instruction. Few channels (an image's three): 8 × 64 on two warps, 1.4 reads.
template <class P>
struct ConvTiles {
  using Wide = DirectTile<P, 64, 64, 4, 2, 9, 2>;
  using Narrow = DirectTile<P, 8, 64, 1, 2, 9, 2>;
};
// Three products need no more reuse than half the channels give, and have no registers for more.
template <>
struct ConvTiles<Tf32x3> {
  using Wide = DirectTile<Tf32x3, 32, 64, 4, 2, 9, 2>;
  using Narrow = DirectTile<Tf32x3, 8, 64, 1, 2, 9, 2>;
};
template <>
struct ConvTiles<Float64> {
  using Wide = DirectTile<Float64, 32, 32, 2, 4, 9, 2>;
  using Narrow = DirectTile<Float64, 8, 32, 1, 4, 9, 2>;
};

constexpr int kConvPositions = 64;  // of one step, at most

template <class P>
bool plan_conv(DirectNorm& p, int64_t limit) {
  using Wide = typename ConvTiles<P>::Wide;
  using Narrow = typename ConvTiles<P>::Narrow;
  // A narrow tile does an eighth of a wide one's work in about a sixth of its time.
  constexpr int kNarrowInWideTime = 3 * Wide::kChannels / Narrow::kChannels / 4;
  p.wide = kNarrowInWideTime * tiles_of(p.geometry.channels, Wide::kChannels) <=
           tiles_of(p.geometry.channels, Narrow::kChannels);
  if (p.wide && plan_tile<Wide>(p, kConvPositions, limit)) return true;
  p.wide = false;  // also where a wide step does not fit: strides and dilations of dozens
  return plan_tile<Narrow>(p, kConvPositions, limit);
}

template <class P>
int run_conv(const DirectNorm& p, void* stream) {
  return p.wide ? launch_tile<typename ConvTiles<P>::Wide>(p, stream)
                : launch_tile<typename ConvTiles<P>::Narrow>(p, stream);
}

}  // namespace engm::cuda
