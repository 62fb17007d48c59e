// Tries kernels on a device: each on problems with ragged edges and on aligned ones, against ATen's operators in float64.
//
// The problems are the smallest that reach what a kernel does: several steps of its pipeline, halos, both orders of
// memory, rows that begin anywhere, more tiles than a warp has lanes. Most operands are small integers, whose products
// and sums are exact in every precision, so that one wrong element shows. In TF32 operands are numbers that it does not
// hold, which the oracle rounds to the nearest that it does; in float32 they are integers that TF32 does not hold.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <sstream>

#include "ops.h"
#include "trust.h"

namespace engm {
namespace {

using Sizes = std::vector<int64_t>;
using MemoryFormat = at::MemoryFormat;

struct OnTrial {
  bool running = false;
  std::optional<Precision> precision;
  bool gram_alone = false;
};
thread_local OnTrial state;

Operators operators_of(at::Device device) {
#if defined(ENGM_EMULATOR)
  (void)device;
  namespace chosen = cuda;
#else
#ifdef ENGM_WITH_CUDA
  if (device.is_cuda()) {
#define ENGM_ADDRESS(name) cuda::name,
    return {ENGM_EACH_OPERATOR(ENGM_ADDRESS)};
#undef ENGM_ADDRESS
  }
#endif
  TORCH_CHECK(device.is_cpu(), "engm has no kernels for ", device, " in this build; see engm.build_info().");
  namespace chosen = cpu;
#endif
#define ENGM_ADDRESS(name) chosen::name,
  return {ENGM_EACH_OPERATOR(ENGM_ADDRESS)};
#undef ENGM_ADDRESS
}

at::ScalarType type_of(Precision precision) {
  switch (precision) {
    case Precision::kFloat64: return at::kDouble;
    case Precision::kBFloat16: return at::kBFloat16;
    case Precision::kFloat16: return at::kHalf;
    default: return at::kFloat;
  }
}

at::Tensor in_double(const at::Tensor& t) { return t.to(at::kDouble); }

std::string first_line(const std::exception& error) {
  const std::string what = error.what();
  return what.substr(0, what.find('\n'));
}

// The geometry of a convolution.
struct Conv {
  Sizes kernel, stride, padding, dilation;
  int64_t groups = 1;
};

const Conv k3x3{{3, 3}, {1, 1}, {1, 1}, {1, 1}};

// One kernel in one precision on one device, and its trials so far.
class Bench {
 public:
  Bench(Kernel kernel, Precision precision, at::Device device)
      : of(operators_of(device)), kernel_(kernel), precision_(precision), device_(device),
        generator_(at::detail::createCPUGenerator(2026)) {}

  const Operators of;
  std::vector<Trial> trials;

  Precision precision() const { return precision_; }
  at::ScalarType type() const { return type_of(precision_); }
  at::ScalarType type_of_sums() const { return type() == at::kDouble ? at::kDouble : at::kFloat; }

  // Runs one trial; an error that a launch or a check raises is its outcome.
  template <class Body>
  void attempt(const char* what, double limit, Body body) {
    trials.push_back({kernel_, precision_, what, 0, limit, ""});
    try {
      body();
    } catch (const std::exception& error) {
      trials.back().failure = first_line(error);
    }
  }

  // The form whose norms a correction has kernels for.
  const char* corrected_form() const {
#if defined(ENGM_EMULATOR)
    return "gram";
#else
    return device_.is_cpu() ? "auto" : "gram";
#endif
  }

  // What rounding explains where sums are exact but for their last bits.
  double rounding() const { return type() == at::kDouble ? 1e-12 : 3e-6; }

  // Integers between -most and most.
  at::Tensor integers(const Sizes& sizes, int64_t most = 3) {
    const at::Tensor drawn = at::randint(-most, most + 1, sizes, generator_, at::TensorOptions().dtype(at::kDouble));
    return drawn.to(device_, type());
  }

  at::Tensor numbers(const Sizes& sizes) {
    return at::randn(sizes, generator_, at::TensorOptions().dtype(at::kDouble)).to(device_, type());
  }

  // Operands that tell the precision apart from coarser ones.
  at::Tensor operand(const Sizes& sizes) {
    if (precision_ == Precision::kTf32) return numbers(sizes);
    return integers(sizes, precision_ == Precision::kFloat32 ? 4100 : 3);
  }

  // The same numbers, one element behind a boundary of 16 bytes.
  static at::Tensor shifted(const at::Tensor& t) {
    const at::Tensor room = at::empty({t.numel() + 1}, t.options());
    return room.narrow(0, 1, t.numel()).view(t.sizes()).copy_(t);
  }

  // What the kernel reads, in float64.
  at::Tensor wide(const at::Tensor& t) const {
    if (precision_ != Precision::kTf32 || t.scalar_type() != at::kFloat) return t.to(at::kDouble);
    const at::Tensor bits = at::bitwise_and(at::add(t.contiguous().view(at::kInt), 0x1000), ~0x1FFF);
    return bits.view(at::kFloat).to(at::kDouble);
  }

  at::Tensor indices(const Sizes& sizes, int64_t rows) {
    return at::randint(0, rows, sizes, generator_, at::TensorOptions().dtype(at::kLong)).to(device_);
  }

  void compare(const at::Tensor& got, const at::Tensor& want) {
    Trial& trial = trials.back();
    if (got.sizes() != want.sizes()) {
      std::ostringstream words;
      words << "a result of shape " << got.sizes() << " instead of " << want.sizes();
      trial.failure = words.str();
      return;
    }
    const at::Tensor wanted = want.to(at::kDouble);
    const double off = at::max(at::abs(at::sub(got.to(at::kDouble), wanted))).item<double>();
    const double error = off / std::max(at::max(at::abs(wanted)).item<double>(), 1e-300);
    if (!(error <= trial.error)) trial.error = std::isnan(error) ? INFINITY : error;
  }

  void linear(const char* what, const at::Tensor& a, const at::Tensor& b, std::string_view form, double limit) {
    attempt(what, limit, [&] {
      compare(of.linear_norm_sq(a, b, form, {}, {}, {}, {}),
              aten::linear_norm_sq(wide(a), wide(b), "auto", {}, {}, {}, {}));
    });
  }

  void linear_grads(const char* what, const at::Tensor& a, const at::Tensor& b) {
    attempt(what, rounding(), [&] {
      const auto [norm_sq, grads] = of.linear_grads(a, b);
      const auto [want_norm_sq, want_grads] = aten::linear_grads(wide(a), wide(b));
      compare(norm_sq, want_norm_sq), compare(grads, want_grads);
    });
  }

  void conv(const char* what, const at::Tensor& x, const at::Tensor& gy, const Conv& c, std::string_view form,
            double limit) {
    attempt(what, limit, [&] {
      compare(of.conv_norm_sq(x, gy, c.kernel, c.stride, c.padding, c.dilation, c.groups, form, {}, {}, {}, {}),
              aten::conv_norm_sq(wide(x), wide(gy), c.kernel, c.stride, c.padding, c.dilation, c.groups, "auto", {}, {},
                                 {}, {}));
    });
  }

  void conv_grads(const char* what, const at::Tensor& x, const at::Tensor& gy, const Conv& c) {
    attempt(what, rounding(), [&] {
      const auto [norm_sq, grads] = of.conv_grads(x, gy, c.kernel, c.stride, c.padding, c.dilation, c.groups);
      const auto [want_norm_sq, want_grads] =
          aten::conv_grads(wide(x), wide(gy), c.kernel, c.stride, c.padding, c.dilation, c.groups);
      compare(norm_sq, want_norm_sq), compare(grads, want_grads);
    });
  }

  // In both orders of memory: channels first and last.
  void conv_in_both_orders(const char* what, const at::Tensor& x, const at::Tensor& gy, const Conv& c,
                           std::string_view form, double limit) {
    conv(what, x, gy, c, form, limit);
    const auto last = [](const at::Tensor& t) { return t.contiguous(MemoryFormat::ChannelsLast); };
    conv(what, last(x), last(gy), c, form, limit);
  }

 private:
  const Kernel kernel_;
  const Precision precision_;
  const at::Device device_;
  at::Generator generator_;
};

void try_gemm(Bench& bench) {
  const at::Tensor a = bench.operand({2, 150, 40}), b = bench.operand({2, 150, 72});
  bench.linear("linear_norm_sq, T = 150, 40 to 72", a, b, "direct", bench.rounding());
  bench.linear_grads("linear_grads, T = 150, 40 to 72", a, b);
  bench.linear("linear_norm_sq, T = 7, 33 to 9, not aligned", Bench::shifted(bench.operand({3, 7, 33})),
               Bench::shifted(bench.operand({3, 7, 9})), "direct", bench.rounding());
  bench.linear("linear_norm_sq, T = 3, 300 to 300", bench.operand({3, 3, 300}), bench.operand({3, 3, 300}), "direct",
               bench.rounding());
  bench.conv_in_both_orders("conv_norm_sq, 1×1 with stride 2", bench.operand({2, 16, 9, 9}),
                            bench.operand({2, 24, 5, 5}), {{1, 1}, {2, 2}, {0, 0}, {1, 1}}, "direct", bench.rounding());
  bench.conv_in_both_orders("conv_norm_sq, 1×1, 40 to 72 channels of 8×16", bench.operand({2, 40, 8, 16}),
                            bench.operand({2, 72, 8, 16}), {{1, 1}, {1, 1}, {0, 0}, {1, 1}}, "direct", bench.rounding());
  const at::Tensor shift = bench.integers({2, 72}).to(bench.type_of_sums()),
                   scale = bench.integers({2, 72}).to(bench.type_of_sums()),
                   mean = bench.integers({40}).to(bench.type_of_sums()),
                   correlation = bench.integers({72, 40}).to(bench.type_of_sums());
  bench.attempt("linear_norm_sq, corrected", bench.rounding(), [&] {
    bench.compare(bench.of.linear_norm_sq(a, b, "direct", shift, mean, scale, correlation),
                  aten::linear_norm_sq(bench.wide(a), bench.wide(b), "direct", in_double(shift), in_double(mean),
                                       in_double(scale), in_double(correlation)));
  });
}

void try_conv(Bench& bench) {
  const double limit = bench.rounding();
  bench.conv_in_both_orders("conv_norm_sq, 9 to 24 channels of 14×9", bench.operand({2, 9, 14, 9}),
                            bench.operand({2, 24, 14, 9}), k3x3, "direct", limit);
  bench.conv_in_both_orders("conv_norm_sq, 40 to 24 channels of 12×11", bench.operand({2, 40, 12, 11}),
                            bench.operand({2, 24, 12, 11}), k3x3, "direct", limit);
  bench.conv_in_both_orders("conv_norm_sq, 64 to 24 channels of 18×8", bench.operand({3, 64, 18, 8}),
                            bench.operand({3, 24, 18, 8}), k3x3, "direct", limit);
  bench.conv("conv_norm_sq, 9 to 8 channels of 2×144", bench.operand({1, 9, 2, 144}), bench.operand({1, 8, 2, 144}), k3x3,
             "direct", limit);
  bench.conv("conv_norm_sq, one operand channels last", bench.operand({1, 16, 9, 16}),
             bench.operand({1, 8, 5, 8}).contiguous(MemoryFormat::ChannelsLast), {{3, 3}, {2, 2}, {1, 1}, {1, 1}}, "direct",
             limit);
  bench.conv("conv_norm_sq, strides and dilations", bench.operand({1, 8, 13, 17}), bench.operand({1, 8, 7, 5}),
             {{3, 2}, {2, 3}, {2, 0}, {2, 3}}, "direct", limit);
  bench.conv("conv_norm_sq, 3-d", bench.operand({1, 8, 5, 6, 7}), bench.operand({1, 8, 3, 6, 7}),
             {{3, 3, 3}, {2, 1, 1}, {1, 1, 1}, {1, 1, 1}}, "direct", limit);
  bench.conv("conv_norm_sq, two groups, not aligned", Bench::shifted(bench.operand({2, 10, 6, 7})),
             Bench::shifted(bench.operand({2, 6, 6, 7})), {{3, 3}, {1, 1}, {1, 1}, {1, 1}, 2}, "direct", limit);
  bench.conv_grads("conv_grads, 3-d", bench.operand({1, 3, 4, 5, 6}), bench.operand({1, 4, 3, 4, 5}),
                   {{2, 2, 2}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}});
  const at::Tensor x = bench.operand({2, 9, 8, 8}), gy = bench.operand({2, 11, 8, 8});
  bench.conv_grads("conv_grads, 9 to 11 channels of 8×8", x, gy, k3x3);
  const auto sums = [&](const Sizes& sizes) { return bench.integers(sizes).to(bench.type_of_sums()); };
  const at::Tensor shift = sums({2, 11}), scale = sums({2, 11}), mean = sums({9, 3, 3}), correlation = sums({11, 9, 3, 3});
  bench.attempt("conv_norm_sq, corrected", limit, [&] {
    const auto& [kernel, stride, padding, dilation, groups] = k3x3;
    bench.compare(bench.of.conv_norm_sq(x, gy, kernel, stride, padding, dilation, groups, "direct", shift, mean, scale,
                                        correlation),
                  aten::conv_norm_sq(bench.wide(x), bench.wide(gy), kernel, stride, padding, dilation, groups, "direct",
                                     in_double(shift), in_double(mean), in_double(scale), in_double(correlation)));
  });
}

void try_depthwise(Bench& bench) {
  for (const int64_t kernel : {3, 4}) {
    const Conv c{{kernel, kernel}, {1, 1}, {1, 1}, {1, 1}, 35};
    bench.conv_in_both_orders("conv_norm_sq, depthwise", bench.integers({2, 35, 9, 8}),
                              bench.integers({2, 70, 12 - kernel, 11 - kernel}), c, "direct", bench.rounding());
  }
}

void try_gram(Bench& bench) {
  const double limit = bench.type() == at::kDouble ? 1e-12 : 1e-5;
  const auto operand = [&](const Sizes& sizes) {
    return bench.integers(sizes, bench.precision() == Precision::kFloat32 ? 4100 : 3);
  };
  const Conv k1x1{{1, 1}, {1, 1}, {0, 0}, {1, 1}};
  bench.conv_in_both_orders("conv_norm_sq, 1×1, 40 to 24 channels of 10×10", operand({2, 40, 10, 10}),
                            operand({2, 24, 10, 10}), k1x1, "gram", limit);
  bench.conv("conv_norm_sq, 1×1, 150 to 70 channels of 4×5, not aligned", Bench::shifted(operand({2, 150, 4, 5})),
             Bench::shifted(operand({2, 70, 4, 5})), k1x1, "gram", limit);
  bench.conv_in_both_orders("conv_norm_sq, 20 to 33 channels of 5×5", operand({2, 20, 5, 5}), operand({2, 33, 5, 5}),
                            k3x3, "gram", limit);
  bench.conv_in_both_orders("conv_norm_sq, 9 to 8 channels of 11×11", operand({2, 9, 11, 11}), operand({2, 8, 11, 11}),
                            k3x3, "gram", limit);
  bench.conv("conv_norm_sq, 12×12 taps", operand({1, 9, 13, 13}), operand({1, 8, 2, 2}),
             {{12, 12}, {1, 1}, {0, 0}, {1, 1}}, "gram", limit);
  bench.conv("conv_norm_sq, 150 taps in a line", operand({1, 2, 200}), operand({1, 3, 349}),
             {{150}, {1}, {149}, {1}}, "gram", limit);
  // Large means and backprops that sum to zero, whose terms cancel: the direct form has to take over.
  const at::Tensor x = at::add(bench.integers({6, 70, 10, 12}), 200), half = bench.integers({6, 70, 5, 12}, 1);
  bench.conv("conv_norm_sq, terms that cancel", x, at::cat({half, at::neg(half)}, 2), k1x1, "gram", limit);
  if (bench.precision() == Precision::kTf32) return;
  // Without the direct form in its place.
  state.gram_alone = true;
  const double alone = bench.type() == at::kDouble ? 1e-9 : bench.type() == at::kFloat ? 2e-5 : 1e-3;
  bench.conv("conv_norm_sq by Gram alone, 20 to 33 channels of 5×5", bench.numbers({2, 20, 5, 5}),
             bench.numbers({2, 33, 5, 5}), k3x3, "gram", alone);
  bench.conv("conv_norm_sq by Gram alone, 16 to 8 channels of 11×11, channels last",
             bench.numbers({2, 16, 11, 11}).contiguous(MemoryFormat::ChannelsLast),
             bench.numbers({2, 8, 11, 11}).contiguous(MemoryFormat::ChannelsLast), k3x3, "gram", alone);
  bench.conv("conv_norm_sq by Gram alone, 1×1, 150 to 70 channels of 4×5", bench.numbers({2, 150, 4, 5}),
             bench.numbers({2, 70, 4, 5}), k1x1, "gram", alone);
  bench.conv_in_both_orders("conv_norm_sq by Gram alone, 1×1, 40 to 24 channels of 10×10",
                            bench.numbers({2, 40, 10, 10}), bench.numbers({2, 24, 10, 10}), k1x1, "gram", alone);
  state.gram_alone = false;
}

// The products are ATen's, in the precision that the backends allow; small integers are exact in any.
void try_contraction(Bench& bench) {
  const double limit = bench.type() == at::kDouble ? 1e-12 : 1e-5;
  const auto of_all_sizes = [&](const char* what) {
    for (const int64_t positions : {2, 5, 20, 64, 65, 131, 200})
      bench.linear(what, bench.integers({3, positions, 40}), bench.integers({3, positions, 24}), "gram", limit);
  };
  of_all_sizes("linear_norm_sq, T = 2 to 200");
  bench.linear("linear_norm_sq, T = 20, 150 to 70, not aligned", Bench::shifted(bench.integers({2, 20, 150})),
               Bench::shifted(bench.integers({2, 20, 70})), "gram", limit);
  const Conv patches{{2, 3}, {2, 3}, {0, 0}, {1, 1}};
  bench.conv_in_both_orders("conv_norm_sq, patches of 2×3", bench.integers({2, 9, 9, 13}), bench.integers({2, 24, 4, 4}),
                            patches, "gram", limit);
  bench.conv_in_both_orders("conv_norm_sq, patches of 2×3, direct", bench.operand({2, 9, 9, 13}),
                            bench.operand({2, 24, 4, 4}), patches, "direct", bench.rounding());
  bench.conv_grads("conv_grads, patches of 2×3", bench.operand({2, 9, 9, 13}), bench.operand({2, 24, 4, 4}), patches);
  // Large means and backprops that sum to zero, whose terms cancel: the direct form has to take over.
  const at::Tensor a = at::add(bench.integers({6, 120, 70}), 200), half = bench.integers({6, 60, 70}, 1);
  bench.linear("linear_norm_sq, terms that cancel", a, at::cat({half, at::neg(half)}, 1), "gram", limit);
  // Without the direct form in its place.
  state.gram_alone = true;
  of_all_sizes("linear_norm_sq by Gram alone, T = 2 to 200");
  state.gram_alone = false;
}

void try_rank_one(Bench& bench) {
  const double limit = bench.type() == at::kDouble ? 1e-12 : 1e-5;
  bench.linear("linear_norm_sq, T = 1, 700 to 33", bench.integers({3, 1, 700}), bench.integers({3, 1, 33}), "gram", limit);
  bench.linear("linear_norm_sq, T = 1, 64 to 32", bench.integers({3, 1, 64}), bench.integers({3, 1, 32}), "gram", limit);
  bench.linear("linear_norm_sq, T = 1, 701 of 704 to every second of 66", bench.integers({3, 1, 704}).narrow(2, 0, 701),
               bench.integers({3, 1, 66}).slice(2, 0, 66, 2), "gram", limit);
}

void try_affine(Bench& bench) {
  // Whole examples in a block and in parts, rows shorter and longer than its accesses, and more channels than threads.
  for (const auto& [channels, positions] : std::vector<std::pair<int64_t, int64_t>>{
           {40, 63}, {40, 64}, {40, 400}, {12, 16}, {12, 205}, {1102, 3}}) {
    for (const int64_t dim : {1, 2}) {
      for (const bool over_positions : {false, true}) {
        const auto draw = [&](int64_t n, int64_t each, int64_t at_each) {
          const at::Tensor t = bench.integers({n, each, at_each});
          return dim == 1 ? t : t.transpose(1, 2).contiguous();
        };
        const auto statistic = [&] {
          return (over_positions ? draw(1, 1, positions) : draw(1, channels, 1)).to(bench.type_of_sums());
        };
        const at::Tensor x = draw(3, channels, positions), gy = draw(3, channels, positions);
        const at::Tensor mean = statistic(), rstd = statistic();
        bench.attempt(dim == 1 ? "affine_norm_sq, channels first" : "affine_norm_sq, channels last", bench.rounding(), [&] {
          const auto [norm_sq, scale, shift] = bench.of.affine_norm_sq(x, gy, mean, rstd, dim);
          const auto [want_norm_sq, want_scale, want_shift] =
              aten::affine_norm_sq(in_double(x), in_double(gy), in_double(mean), in_double(rstd), dim);
          bench.compare(norm_sq, want_norm_sq), bench.compare(scale, want_scale), bench.compare(shift, want_shift);
        });
      }
    }
  }
}

void try_correction(Bench& bench) {
  const double rounding = bench.type() == at::kBFloat16 ? 4e-3 : bench.type() == at::kHalf ? 5e-4 : bench.rounding();
  for (const auto& [positions, last] : {std::pair<int64_t, bool>{63, false}, {63, true}, {504, false}, {504, true}}) {
    const at::Tensor drawn = bench.integers({3, 40, positions});
    const at::Tensor y = last ? drawn.transpose(1, 2).contiguous().transpose(1, 2) : drawn;
    std::vector<at::Tensor> rest;
    for (const Sizes& sizes : {Sizes{40}, Sizes{40}, Sizes{40}, Sizes{3, 40}, Sizes{3, 40}})
      rest.push_back(bench.integers(sizes).to(bench.type_of_sums()));
    bench.attempt(last ? "correction_factors, channels last" : "correction_factors, channels first", rounding, [&] {
      const auto [normalised, shift, scale] = bench.of.correction_factors(y, rest[0], rest[1], rest[2], rest[3], rest[4]);
      const auto [want, want_shift, want_scale] = aten::correction_factors(
          in_double(y), in_double(rest[0]), in_double(rest[1]), in_double(rest[2]), in_double(rest[3]),
          in_double(rest[4]));
      bench.compare(normalised, want), bench.compare(shift, want_shift), bench.compare(scale, want_scale);
    });
  }
  const auto mean_of = [&](const char* what, const at::Tensor& x, const Conv& c) {
    bench.attempt(what, bench.rounding(), [&] {
      bench.compare(bench.of.patch_mean(x, c.kernel, c.stride, c.padding, c.dilation),
                    aten::patch_mean(in_double(x), c.kernel, c.stride, c.padding, c.dilation));
    });
  };
  const auto in_both_orders = [&](const char* what, const at::Tensor& x, const Conv& c) {
    mean_of(what, x, c), mean_of(what, x.contiguous(MemoryFormat::ChannelsLast), c);
  };
  in_both_orders("patch_mean, 3×3 of 14×9", bench.integers({3, 35, 14, 9}), k3x3);
  in_both_orders("patch_mean, 3×3 of 2×2", bench.integers({5, 64, 2, 2}), k3x3);
  in_both_orders("patch_mean, strides and dilations", bench.integers({3, 8, 19, 17}), {{3, 4}, {2, 3}, {2, 1}, {2, 3}});
  mean_of("patch_mean, 3-d", bench.integers({2, 3, 5, 6, 7}), {{3, 2, 3}, {2, 1, 1}, {1, 1, 0}, {1, 1, 2}});
  mean_of("patch_mean, a line", bench.integers({3, 4, 300}), {{5}, {1}, {2}, {1}});
  for (const bool last : {false, true}) {
    const auto memory = last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
    for (const int64_t side : {2, 5}) {
      const at::Tensor x = bench.integers({2, 9, side, side}).contiguous(memory),
                       gy = bench.integers({2, 40, side, side}).contiguous(memory);
      const auto sums = [&](const Sizes& sizes) { return bench.integers(sizes, 1).to(bench.type_of_sums()); };
      const at::Tensor shift = sums({2, 40}), mean = sums({9, 3, 3}), scale = sums({2, 40}),
                       correlation = sums({40, 9, 3, 3});
      const auto& [kernel, stride, padding, dilation, groups] = k3x3;
      bench.attempt("conv_norm_sq, corrected", 1e-5, [&] {
        bench.compare(bench.of.conv_norm_sq(x, gy, kernel, stride, padding, dilation, groups, bench.corrected_form(),
                                            shift, mean, scale, correlation),
                      aten::conv_norm_sq(in_double(x), in_double(gy), kernel, stride, padding, dilation, groups, "auto",
                                         in_double(shift), in_double(mean), in_double(scale), in_double(correlation)));
      });
    }
  }
}

void try_embedding(Bench& bench) {
  for (const auto& [positions, channels] : {std::pair<int64_t, int64_t>{41, 300}, {300, 5}}) {
    const at::Tensor indices = bench.indices({2, positions}, 5), gy = bench.integers({2, positions, channels});
    indices.select(1, positions - 1).fill_(5);  // alone, and the last of fewer positions than a warp takes at once
    for (const int64_t padding : {-1, 3}) {
      bench.attempt(padding < 0 ? "embedding_norm_sq" : "embedding_norm_sq with a padding row", bench.rounding(), [&] {
        bench.compare(bench.of.embedding_norm_sq(indices, gy, padding),
                      aten::embedding_norm_sq(indices, gy.to(at::kDouble), padding));
      });
    }
  }
}

void try_weighting(Bench& bench) {
  const std::vector<at::Tensor> tensors{bench.integers({75, 5, 16}), bench.integers({75, 7}),
                                        bench.integers({75, 2500}), Bench::shifted(bench.integers({75, 32}))};
  const at::Tensor weights = bench.integers({75}).to(bench.type_of_sums());
  std::vector<at::Tensor> wide;
  for (const at::Tensor& t : tensors) wide.push_back(t.to(at::kDouble));
  const auto compare_all = [&](const std::vector<at::Tensor>& got, const std::vector<at::Tensor>& want) {
    for (size_t k = 0; k < want.size(); ++k) bench.compare(got[k], want[k]);
  };
  bench.attempt("scale_examples", bench.rounding(), [&] {
    compare_all(bench.of.scale_examples(tensors, weights), aten::scale_examples(wide, weights.to(at::kDouble)));
  });
  bench.attempt("weighted_sums", bench.rounding(), [&] {
    compare_all(bench.of.weighted_sums(tensors, weights), aten::weighted_sums(wide, weights.to(at::kDouble)));
  });
}

void try_weighted_gemm(Bench& bench) {
  for (const auto& [positions, p, d] : {std::tuple<int64_t, int64_t, int64_t>{30, 140, 72}, {300, 20, 9}}) {
    const at::Tensor a = bench.integers({5, positions, p}), b = bench.integers({5, positions, d});
    const at::Tensor weights = bench.integers({5}, 2).to(bench.type_of_sums());
    bench.attempt("weighted_gemm", bench.rounding(), [&] {
      bench.compare(bench.of.weighted_gemm(a, b, weights),
                    aten::weighted_gemm(a.to(at::kDouble), b.to(at::kDouble), weights.to(at::kDouble)));
    });
  }
}

void try_clipping(Bench& bench) {
  at::Tensor squares = at::abs(bench.numbers({5, 300}));
  squares.select(1, 7).zero_();
  squares.select(1, 8).fill_(-1);  // what rounding may make of a small sum
  squares.select(0, 2).select(0, 9).fill_(INFINITY), squares.select(0, 4).select(0, 10).fill_(NAN);
  const at::Tensor factors = at::abs(bench.numbers({5})).to(at::kDouble);
  for (const bool with_factors : {false, true}) {
    const OptionalTensor given = with_factors ? OptionalTensor(factors) : OptionalTensor();
    bench.attempt("clip_weights", bench.rounding(), [&] {
      const auto [norms, weights] = bench.of.clip_weights(squares, 1.5, given);
      const auto [want_norms, want_weights] = aten::clip_weights(squares.to(at::kDouble), 1.5, given);
      for (const auto& [got, want] : {std::pair(norms, want_norms), std::pair(weights, want_weights)}) {
        bench.compare(at::nan_to_num(got, 3, 4, 5), at::nan_to_num(want, 3, 4, 5));
        bench.compare(at::isfinite(got), at::isfinite(want));
      }
    });
  }
}

// Whether a family of kernels knows a precision, of float32 the two ways to multiply, as one of its own.
bool has(Kernel kernel, Precision precision, at::Device device) {
#ifndef ENGM_EMULATOR
  if (device.is_cpu() && precision == Precision::kTf32) return false;
#endif
  switch (kernel) {
    case Kernel::kClipWeights: return precision == Precision::kFloat32 || precision == Precision::kFloat64;
    case Kernel::kAffineNorm:
    case Kernel::kCorrection:
    case Kernel::kEmbeddingNorm:
    case Kernel::kWeighting: return precision != Precision::kTf32;
    default: return true;
  }
}

}  // namespace

bool on_trial() { return state.running; }
std::optional<Precision> precision_on_trial() { return state.precision; }
bool gram_on_its_own() { return state.gram_alone; }

std::vector<Trial> trials_of(Kernel kernel, Precision precision, at::Device device) {
  if (!has(kernel, precision, device)) return {};
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset), no_modes(c10::python_ks);
  struct Scope {
    Scope(Precision p) { state = {true, p, false}; }
    ~Scope() { state = {}; }
  } const scope(precision);
  Bench bench(kernel, precision, device);
  switch (kernel) {
    case Kernel::kGemmNorm: try_gemm(bench); break;
    case Kernel::kConvNorm: try_conv(bench); break;
    case Kernel::kDepthwiseNorm: try_depthwise(bench); break;
    case Kernel::kGramNorm: try_gram(bench); break;
    case Kernel::kGramContraction: try_contraction(bench); break;
    case Kernel::kRankOne: try_rank_one(bench); break;
    case Kernel::kAffineNorm: try_affine(bench); break;
    case Kernel::kCorrection: try_correction(bench); break;
    case Kernel::kEmbeddingNorm: try_embedding(bench); break;
    case Kernel::kClipWeights: try_clipping(bench); break;
    case Kernel::kWeighting: try_weighting(bench); break;
    case Kernel::kWeightedGemm: try_weighted_gemm(bench); break;
    case Kernel::kCount: break;
  }
  return std::move(bench.trials);
}

}  // namespace engm
