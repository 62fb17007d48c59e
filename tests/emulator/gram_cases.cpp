// The Gram form's plan and launchers for ctypes: what their bindings hide (plan, partial sums, shared memory) included.
#include <limits>
#include <vector>

#include "exported.h"
#include "gram_contraction.h"
#include "gram_norm.h"

using namespace engm::cuda;

namespace {

template <typename Call>
const char* guarded(Call call) {
  static std::string message;
  try {
    const int code = call();
    if (code == 0) return nullptr;
    message = "launch returned " + std::to_string(code);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

const int64_t* read(const int64_t* from, int (&to)[3]) {
  for (int& v : to) v = int(*from++);
  return from;
}

const int64_t* read(const int64_t* from, Operand& to) {
  to.example = from[0], to.channel = from[1];
  for (int d = 0; d < 3; ++d) to.space[d] = from[2 + d];
  return from + 5;
}

GramNorm problem(const int64_t* from) {
  GramNorm p{};
  Geometry& g = p.geometry;
  g.n = *from++, g.groups = int(*from++), g.channels = int(*from++), g.rows = int(*from++);
  for (auto* v : {&g.in, &g.out, &g.kernel, &g.stride, &g.padding, &g.dilation}) from = read(from, *v);
  read(read(from, p.x), p.gy);
  return p;
}

template <typename Sum>
const char* run(GramNorm& p, Precision precision, int64_t count, double* sums) {
  std::vector<Sum> partial(size_t(p.geometry.n * count), std::numeric_limits<Sum>::quiet_NaN());
  p.partial = partial.data();
  const char* error = guarded([&] { return launch_gram_norm(p, precision, nullptr); });
  for (int64_t i = 0; i < p.geometry.n * count; ++i) sums[i / count * 2 + i % 2] += double(partial[size_t(i)]);
  return error;
}

}  // namespace

// numbers: n, groups, channels, rows, six times three of Geometry, example, channel and three spatial strides of x and
// of gy. plan: bands, pairs, steps of a stage, chunks of taps, axes apart, threads, shared bytes. sums: [n, 2] zeros,
// for the totals of Σ and Σ|terms|.
ENGM_EXPORT int64_t plan_gram(const int64_t* numbers, int precision, int64_t limit, int64_t* plan) {
  GramNorm p = problem(numbers);
  const int64_t count = plan_gram_norm(p, Precision(precision), limit);
  const int64_t found[] = {p.band_count, p.tiles, 1 << p.log_steps, p.chunks[0] * p.chunks[1] * p.chunks[2],
                           p.apart[0] + p.apart[1] + p.apart[2], p.threads, p.shared};
  std::copy(std::begin(found), std::end(found), plan);
  return count;
}

ENGM_EXPORT const char* run_gram(const int64_t* numbers, int precision, int64_t limit, const void* x, const void* gy,
                                 void* out, uint8_t* reliable, double* sums) {
  GramNorm p = problem(numbers);
  p.x.data = x, p.gy.data = gy, p.out = out, p.reliable = reliable;
  const int64_t count = plan_gram_norm(p, Precision(precision), limit);
  if (count == 0) return "no plan";
  return Precision(precision) == Precision::kFloat64 ? run<double>(p, Precision(precision), count, sums)
                                                     : run<float>(p, Precision(precision), count, sums);
}

// strides: example and channel of a, then of b.
ENGM_EXPORT const char* run_rank_one(int precision, int64_t n, int64_t channels, int64_t rows, const int64_t* strides,
                                     const void* a, const void* b, void* out) {
  RankOne p{};
  p.a.data = a, p.a.example = strides[0], p.a.channel = strides[1];
  p.b.data = b, p.b.example = strides[2], p.b.channel = strides[3];
  p.n = n, p.channels = channels, p.rows = rows, p.out = out;
  return guarded([&] { return launch_rank_one(p, Precision(precision), nullptr); });
}

// p and q: [n, T, pitch].
ENGM_EXPORT const char* run_contraction(int precision, int64_t n, int64_t positions, int64_t pitch, const void* p,
                                        const void* q, void* out, uint8_t* reliable) {
  GramContraction c{};
  c.p = p, c.q = q, c.out = out, c.reliable = reliable;
  c.n = n, c.positions = int(positions), c.pitch = int(pitch);
  return guarded([&] { return launch_gram_contraction(c, Precision(precision), nullptr); });
}
