// Prints the plans of direct_launch.cuh for convolutions and linear layers, one a line, for tools/machine_code.py. Compiled
// by g++ with the emulator's words in place of CUDA's; nothing is run.
//
// Input, a line each:  precision (tf32 bfloat16)  channels last (0 1)  shared bytes  multiprocessors examples channels
//                      rows height width kernel stride padding
// Output:  policy; channels, rows, warps along both, taps, stages, blocks of the tile; how many tiles, bytes of shared
//          memory, blocks that share a tile's examples, taps of a tile, steps, positions; copies (0 elements, 1 rows, 2
//          lines), rows, entries, lanes, batches of x's staging and of gy's
#include <cstdio>
#include <iostream>
#include <string>

#include "conv_norm.cuh"
#include "copies.h"
#include "gemm_norm.cuh"

using namespace engm::cuda;

template <class Tile>
void print(const DirectNorm& p, const char* policy) {
  const Geometry& g = p.geometry;
  const int steps = tiles_of(g.out[1], p.tile_h) * tiles_of(g.out[2], p.tile_w);
  const int64_t share = plan_example_step(g.n, p.tiles(), steps, int64_t(Tile::kBlocks) * p.multiprocessors);
  std::printf("%s %d %d %d %d %d %d %d %lld %lld %lld %d %d %d", policy, Tile::kChannels, Tile::kRows, Tile::kWarpsC,
              Tile::kWarpsD, Tile::kTaps, Tile::kStages, Tile::kBlocks, static_cast<long long>(p.tiles()),
              static_cast<long long>(p.layout.bytes), static_cast<long long>(share), p.taps_a_tile, steps, p.positions);
  for (const Staging* s : {&p.x_staging, &p.gy_staging})
    std::printf(" %d %d %d %d %d", int(s->copies), s->rows, s->copies == Copies::kLines ? s->entries : 0, s->lanes,
                s->batches);
  std::printf("\n");
}

template <class P>
bool plan(DirectNorm& p, int64_t limit, const char* policy) {
  if (p.geometry.taps() == 1 && p.geometry.stride[1] == 1) {
    if (!plan_gemm<P>(p, limit)) return false;
    p.wide ? print<typename GemmTiles<P>::Wide>(p, policy) : print<typename GemmTiles<P>::Small>(p, policy);
  } else {
    if (!plan_conv<P>(p, limit)) return false;
    p.wide ? print<typename ConvTiles<P>::Wide>(p, policy) : print<typename ConvTiles<P>::Narrow>(p, policy);
  }
  return true;
}

// Lays contiguous images out, channels first or last, and asks how they are copied.
void lay_out(Operand& o, Staging& s, const Geometry& g, int channels, const int (&size)[3], bool last,
             int64_t element) {
  const int64_t pixels = int64_t(size[1]) * size[2], pixel = last ? channels : 1;
  o = {nullptr, pixels * channels, last ? 1 : pixels, {pixels * pixel, size[2] * pixel, pixel}};
  s = Staging{};
  s.copies = copies_of(o, size, g.n, channels, g.groups, element);
}

int main() {
  std::string precision;
  int last, kernel, stride, padding;
  long long limit;
  DirectNorm p{};
  Geometry& g = p.geometry;
  while (std::cin >> precision >> last >> limit >> p.multiprocessors >> g.n >> g.channels >> g.rows >> g.in[1] >>
         g.in[2] >> kernel >> stride >> padding) {
    g.groups = 1;
    g.in[0] = g.out[0] = g.kernel[0] = 1;
    for (int i = 0; i < 3; ++i) g.stride[i] = g.dilation[i] = 1, g.padding[i] = 0;
    for (int i = 1; i < 3; ++i) {
      g.kernel[i] = kernel, g.stride[i] = stride, g.padding[i] = padding;
      g.out[i] = (g.in[i] + 2 * padding - kernel) / stride + 1;
    }
    const int64_t element = precision == "tf32" ? 4 : 2;
    lay_out(p.x, p.x_staging, g, g.channels, g.in, last != 0, element);
    lay_out(p.gy, p.gy_staging, g, g.rows, g.out, last != 0, element);
    const bool fits = precision == "tf32" ? plan<Tf32InPlace>(p, limit, "Tf32InPlace") : plan<BFloat16>(p, limit, "BFloat16");
    if (!fits) std::printf("none\n");
  }
}
