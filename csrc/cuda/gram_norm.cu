// Plans the Gram form, and chooses the precision of gram_norm.cuh and rank_one.cuh.
#include <algorithm>
#include <limits>

#include "gram_cancellation.h"
#include "gram_norm_launch.cuh"
#include "rank_one.cuh"

namespace engm::cuda {
namespace {

int64_t parts_of(int64_t length, int64_t part) { return (length + part - 1) / part; }
int64_t aligned_16(int64_t bytes) { return parts_of(bytes, 16) * 16; }

// Sizes of one precision, in bytes. A step of the matrix instruction is 32 bytes deep in all precisions.
struct Sizes {
  int element, sum, pad;
};

Sizes sizes_of(Precision precision) {
  switch (precision) {
    case Precision::kFloat64: return {8, 8, Float64::kPadOfM * 8};
    case Precision::kBFloat16: return {2, 4, BFloat16::kPadOfM * 2};
    case Precision::kFloat16: return {2, 4, Float16::kPadOfM * 2};
    default: return {4, 4, Tf32::kPadOfM * 4};
  }
}

// The most pixels along axis d that a band touches through a chunk of taps.
int64_t most_pixels(const GramNorm& p, int d) {
  const Geometry& g = p.geometry;
  const int64_t reach = (p.taps[d] - 1) * int64_t(g.dilation[d]), step = int64_t(p.band[d]) * g.stride[d];
  const int64_t extent = step - g.stride[d] + reach + 1;
  if (p.bands[d] > 2 || p.chunks[d] > 1) return std::min<int64_t>(extent, g.in[d]);
  // Every band lies at an edge of the image, which clips it.
  int64_t most = 0;
  for (int band = 0; band < p.bands[d]; ++band) {
    const int64_t low = band * step - g.padding[d];
    most = std::max(most, std::min<int64_t>(low + extent, g.in[d]) - std::max<int64_t>(low, 0));
  }
  return most;
}

// Places everything in shared memory, or returns false if it takes more than `limit` bytes.
bool place(GramNorm& p, int64_t positions, int64_t taps, const Sizes& size, int64_t limit) {
  const int64_t row = (int64_t(32) << p.log_steps) + size.pad;
  const int64_t stages = kGramStages * (p.band_count > 1 ? 2 : 1) * p.tile_rows * row;
  const int64_t gram = int64_t(p.gram_pitch) * p.gram_pitch * size.sum;
  const int64_t offset_at = aligned_16(std::max(stages, gram)) + aligned_16(positions * p.q_pitch * size.sum);
  const int64_t table_at = offset_at + 2 * p.tile_rows * int64_t(sizeof(int));
  const int64_t side_at = table_at + 2 * taps * kGramPositions * int64_t(sizeof(uint16_t));
  const int64_t scratch_at = side_at + aligned_16(2 * sizeof(GramSide));
  p.shared = scratch_at + 2 * (p.threads / 32) * size.sum;
  if (p.shared > limit) return false;
  p.q_at = int(aligned_16(std::max(stages, gram))), p.offset_at = int(offset_at), p.table_at = int(table_at);
  p.side_at = int(side_at), p.scratch_at = int(scratch_at);
  return true;
}

// Sets everything that follows from bands and taps, or returns false if it does not fit.
bool lay_out(GramNorm& p, const Sizes& size, int64_t limit) {
  const Geometry& g = p.geometry;
  int64_t positions = 1, pixels = 1, taps = 1, bands = 1;
  for (int d = 0; d < 3; ++d) {
    p.bands[d] = int(parts_of(g.out[d], p.band[d])), p.chunks[d] = int(parts_of(g.kernel[d], p.taps[d]));
    const int64_t apart = int64_t(p.band[d]) * p.taps[d], together = most_pixels(p, d);
    p.apart[d] = apart < together;
    positions *= p.band[d], pixels *= std::min(apart, together), taps *= p.taps[d], bands *= p.bands[d];
    if (positions > kGramPositions || pixels > kGramPixels) return false;
  }
  const int64_t pairs = bands * (bands + 1) / 2;
  if (bands > INT32_MAX / g.groups || pairs > INT32_MAX / g.groups / std::max<int64_t>(g.n, 1)) return false;
  p.band_count = int(bands), p.tiles = int(pairs);
  p.tile_rows = int(aligned_16(std::max(pixels, positions)));
  p.threads = p.tile_rows <= 64 ? 256 : 512;
  p.gram_pitch = int(pixels) + 1, p.q_pitch = int(positions) | 1;
  // Few rows leave room for deep stages, which the warps share by steps; deeper than the operands is of no use. Two
  // blocks of 256 threads should fit into a multiprocessor, whose memory is about what one block may use.
  const int64_t inner = int64_t(std::max(g.channels, g.rows)) * size.element;
  int most = p.tile_rows <= 32 ? 4 : p.tile_rows <= 64 ? 3 : 2;
  while (most > 0 && (int64_t(16) << most) >= inner) --most;
  if (p.threads == 256)
    for (p.log_steps = most; p.log_steps >= 2; --p.log_steps)
      if (place(p, positions, taps, size, limit / 2 - 1024)) return true;
  for (p.log_steps = most; p.log_steps >= 0; --p.log_steps)
    if (place(p, positions, taps, size, limit)) return true;
  return false;
}

// Estimates the time of one example and group, in multiply-adds of the tensor cores. The fragments of a product take
// about as long to read as to multiply, and four bytes of an operand as long as a hundred; a pair of positions and a
// tap is a few reads; a block has to start, and every pass to fill the pipeline. Pairs of a band with itself need half
// the products and one operand.
double cost_of(const GramNorm& p, const Sizes& size) {
  constexpr double kProduct = 2, kByte = 25, kTap = 40, kBlock = 5e5, kPass = 5e5;
  const Geometry& g = p.geometry;
  const double pixels = double(aligned_16(p.gram_pitch - 1)), positions = double(p.band[0]) * p.band[1] * p.band[2];
  const double rows = double(aligned_16(int64_t(positions))), chunks = double(p.chunks[0]) * p.chunks[1] * p.chunks[2];
  const double fixed = kBlock + kPass * (1 + chunks);
  const double loads = kByte * size.element * (chunks * pixels * (g.channels + 8) + rows * (g.rows + 8));
  const double products = kProduct * (chunks * pixels * pixels * (g.channels + 8) + rows * rows * (g.rows + 8)) +
                          kTap * positions * positions * g.taps();
  return p.band_count * (fixed + loads + products / 2) + (p.tiles - p.band_count) * (fixed + 2 * loads + products);
}

// The next smaller length of a band that cuts `whole` into more parts of about one size, and 0 after 1.
int next_band(int whole, int band) {
  if (band == 1) return 0;
  return int(parts_of(whole, parts_of(whole, band - 1)));
}

int first_band(int whole) { return int(parts_of(whole, parts_of(whole, kGramPositions))); }

struct Best {
  GramNorm plan;
  double cost = std::numeric_limits<double>::infinity();
};

// Tries bands for given taps. Plans are made at every call, so the search stops early: of a line it tries the two
// widest bands that fit, and none with a quarter of the positions of one that fits.
void search_bands(GramNorm& p, const Sizes& size, int64_t limit, Best& best) {
  const int(&out)[3] = p.geometry.out;
  int64_t widest = 0;
  for (int z = first_band(out[0]); z > 0; z = next_band(out[0], z))
    for (int y = first_band(out[1]); y > 0; y = next_band(out[1], y)) {
      int fitting = 0;
      for (int x = first_band(out[2]); x > 0 && fitting < 2; x = next_band(out[2], x)) {
        const int64_t positions = int64_t(z) * y * x;
        if (positions > kGramPositions) continue;
        if (positions * 4 <= widest) break;
        p.band[0] = z, p.band[1] = y, p.band[2] = x;
        if (!lay_out(p, size, limit)) continue;
        ++fitting;
        widest = std::max(widest, positions);
        const double cost = cost_of(p, size);
        if (cost < best.cost) best.cost = cost, best.plan = p;
      }
    }
}

bool aligned(const void* data, int64_t elements, int size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && elements * size % 16 == 0;
}

// Whether every pixel's channels of a group can be copied in pieces of 16 bytes.
bool takes_vectors(const Operand& operand, const int (&extent)[3], const Geometry& g, int channels, int size) {
  bool good = operand.channel == 1 && aligned(operand.data, g.n > 1 ? operand.example : 0, size) &&
              aligned(operand.data, g.groups > 1 ? channels : 0, size);
  for (int d = 0; d < 3; ++d) good = good && aligned(operand.data, extent[d] > 1 ? operand.space[d] : 0, size);
  return good;
}

}  // namespace

int64_t plan_gram_norm(GramNorm& problem, Precision precision, int64_t shared_limit) {
  const Geometry& g = problem.geometry;
  const Sizes size = sizes_of(precision);
  Best best{problem};
  for (int split = 0; split < 8; ++split) {  // takes the taps along each axis all at once or one by one
    GramNorm p = problem;
    bool same = false;
    for (int d = 0; d < 3; ++d) {
      const bool one = split >> d & 1;
      p.taps[d] = one ? 1 : g.kernel[d];
      same = same || (one && g.kernel[d] == 1);
    }
    if (!same) search_bands(p, size, shared_limit, best);
  }
  if (best.cost == std::numeric_limits<double>::infinity()) return 0;
  problem = best.plan;
  return int64_t(2) * g.groups * problem.tiles;
}

int launch_gram_norm(const GramNorm& problem, Precision precision, void* stream) {
  GramNorm p = problem;
  const Geometry& g = p.geometry;
  const int size = sizes_of(precision).element;
  p.cancellation = gram_cancellation(precision);
  p.x_vectors = takes_vectors(p.x, g.in, g, g.channels, size);
  p.gy_vectors = takes_vectors(p.gy, g.out, g, g.rows, size);
  switch (precision) {
    case Precision::kTf32: return launch_gram<Tf32>(p, stream);
    case Precision::kFloat32: return launch_gram<Tf32x3>(p, stream);
    case Precision::kBFloat16: return launch_gram<BFloat16>(p, stream);
    case Precision::kFloat16: return launch_gram<Float16>(p, stream);
    default: return launch_gram<Float64>(p, stream);
  }
}

int launch_rank_one(const RankOne& problem, Precision precision, void* stream) {
  RankOne p = problem;
  const int size = sizes_of(precision).element;
  p.a_vectors = p.a.channel == 1 && aligned(p.a.data, p.n > 1 ? p.a.example : 0, size);
  p.b_vectors = p.b.channel == 1 && aligned(p.b.data, p.n > 1 ? p.b.example : 0, size);
  const auto start = [&](auto kernel) {
    return launch(kernel, p.n, kRankOneThreads, 2 * (kRankOneThreads / 32) * sizeof(double), stream, p);
  };
  switch (precision) {
    case Precision::kBFloat16: return start(rank_one_kernel<Bf16, float>);
    case Precision::kFloat16: return start(rank_one_kernel<Half, float>);
    case Precision::kFloat64: return start(rank_one_kernel<double, double>);
    default: return start(rank_one_kernel<float, float>);
  }
}

}  // namespace engm::cuda
