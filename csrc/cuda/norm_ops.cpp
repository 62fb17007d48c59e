// Binds linear_norm_sq, conv_norm_sq, linear_grads and conv_grads on CUDA: checks operands, chooses the form, allocates
// workspaces and launches.
//
// Nothing is copied but patches that a convolution reads once each: kernels take any strides. Nothing waits for the
// device: examples whose Gram terms cancel are marked on the device, and the direct form's blocks leave the others
// alone. Where the device has shown a kernel to be wrong (../trust.h), another form takes its place, or ATen's
// operators.
#include <ATen/Context.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <string>

#include "../ops.h"
#include "../precision.h"
#include "copies.h"
#include "depthwise_norm.h"
#include "direct_norm.h"
#include "element_type.h"
#include "expanded_correction.h"
#include "gram_contraction.h"
#include "gram_norm.h"
#include "stream.h"
#include "sum_partials.h"

namespace engm::cuda {
namespace {

struct Problem {
  Geometry geometry{};
  Operand x{}, gy{};
  Precision precision{};
  Copies x_copies{}, gy_copies{};
  at::Tensor a, b;  // the factors [n, T, p] and [n, T, d] of a linear layer; undefined for a convolution
};

Operand operand(const at::Tensor& t) {  // [n, channels, *space]
  Operand o{t.const_data_ptr(), t.stride(0), t.stride(1), {0, 0, 0}};
  for (int64_t i = 2; i < t.dim(); ++i) o.space[3 - t.dim() + i] = t.stride(i);
  return o;
}

int narrow(int64_t value, const char* op) {
  TORCH_CHECK(value <= INT32_MAX, op, ": a dimension of ", value, " elements is more than the CUDA kernels count to.");
  return static_cast<int>(value);
}

// Turns a 1×1 convolution, which reads every stride-th pixel, into a dense problem over a strided view. Dimensions that
// follow each other in both operands become one long line.
void simplify(Geometry& g, Operand& x, const Operand& gy) {
  for (int i = 0; i < 3; ++i) {
    if (g.kernel[i] != 1 || g.padding[i] != 0) continue;
    x.space[i] *= g.stride[i];
    g.in[i] = g.out[i];
    g.stride[i] = g.dilation[i] = 1;
  }
  if (g.taps() != 1 || g.pixels() != g.positions() || g.pixels() > INT32_MAX) return;
  for (int i : {1, 0}) {
    const bool follows = g.in[i] == 1 || (x.space[i] == g.in[2] * x.space[2] && gy.space[i] == g.in[2] * gy.space[2]);
    if (g.padding[0] + g.padding[1] + g.padding[2] != 0 || !follows) return;
    g.in[2] = g.out[2] = g.in[2] * g.in[i];
    g.in[i] = g.out[i] = 1;
  }
}

Problem problem_of(const ConvShape& s, const at::Tensor& x, const at::Tensor& gy, bool convolution, const char* op) {
  Problem p;
  Geometry& g = p.geometry;
  g.n = s.n, g.groups = narrow(s.groups, op);
  g.channels = narrow(s.group_channels(), op), g.rows = narrow(s.group_rows(), op);
  for (int i = 0; i < 3; ++i) {
    g.in[i] = narrow(s.in[i], op), g.out[i] = narrow(s.out[i], op), g.kernel[i] = narrow(s.kernel[i], op);
    g.stride[i] = narrow(s.stride[i], op), g.padding[i] = narrow(s.padding[i], op);
    g.dilation[i] = narrow(s.dilation[i], op);
    narrow(s.padded()[i], op);
  }
  p.x = operand(x), p.gy = operand(gy);
  p.precision = precision_of(x.scalar_type(), convolution);
  simplify(g, p.x, p.gy);
  const int64_t element = x.element_size();
  p.x_copies = copies_of(p.x, g.in, g.n, g.channels, g.groups, element);
  p.gy_copies = copies_of(p.gy, g.out, g.n, g.rows, g.groups, element);
  return p;
}

// A linear layer, or a convolution's patches as one, whose products then follow the convolution's switch for TF32.
Problem problem_of_rows(const ConvShape& s, const at::Tensor& a, const at::Tensor& b, bool convolution,
                        const char* op) {
  Problem p = problem_of(s, a.transpose(1, 2), b.transpose(1, 2), convolution, op);
  p.a = a, p.b = b;
  return p;
}

// The patches of images x [n, C, *S] that a convolution reads once each, [n, T, C·taps]: a copy, for the taps of a row
// lie side by side.
at::Tensor patches_of(const ConvShape& s, const at::Tensor& x) {
  const int64_t dimensions = x.dim() - 2;
  at::Tensor patches = x;  // [n, C, *out, *kernel]
  std::vector<int64_t> order{0};
  for (int64_t i = 0; i < dimensions; ++i) {
    const size_t axis = size_t(3 - dimensions + i);
    patches = patches.unfold(2 + i, s.kernel[axis], s.stride[axis]);
    order.push_back(2 + i);
  }
  order.push_back(1);
  for (int64_t i = 0; i < dimensions; ++i) order.push_back(2 + dimensions + i);
  return patches.permute(order).reshape({s.n, s.positions(), s.channels * s.taps()});
}

at::TensorOptions sums_of(const at::Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).memory_format(std::nullopt);
}

void sum_partials(const at::Tensor& partial, const uint8_t* done, const at::Tensor& out, const OnDevice& on,
                  const char* op) {
  const SumPartials p{partial.const_data_ptr(),        done, out.mutable_data_ptr(), partial.size(0), partial.size(1),
                      out.scalar_type() == at::kDouble};
  check_launch(launch_sum_partials(p, on.stream()), op);
}

// The kernel of the direct form that takes a problem.
Kernel direct_kernel(const Geometry& g) {
  if (g.channels == 1 && g.taps() > 1) return Kernel::kDepthwiseNorm;
  return g.taps() == 1 && g.pixels() == g.positions() ? Kernel::kGemmNorm : Kernel::kConvNorm;
}

// Forms the squared norms of the examples that are not `done`, and where wanted the gradients, by the direct form.
void direct(const Problem& problem, const std::optional<CorrectionTensors>& correction, const at::Tensor* grads,
            const uint8_t* done, const at::Tensor& out, const OnDevice& on, const char* op) {
  DirectNorm p{};
  p.x = problem.x, p.gy = problem.gy, p.geometry = problem.geometry;
  p.x_staging.copies = problem.x_copies, p.gy_staging.copies = problem.gy_copies;
  p.done = done;
  p.multiprocessors = on_trial() ? 2 : on.multiprocessors();  // in trials a block takes several examples
  if (correction) {
    p.shift = correction->shift.const_data_ptr(), p.scale = correction->scale.const_data_ptr();
    p.patch_mean = correction->patch_mean.const_data_ptr(), p.correlation = correction->correlation.const_data_ptr();
  }
  if (grads != nullptr) p.grads = grads->mutable_data_ptr();
  const Geometry& g = p.geometry;
  const Kernel kernel = direct_kernel(g);
  at::Tensor partial;
  if (kernel == Kernel::kDepthwiseNorm) {
    partial = at::empty({g.n, depthwise_tiles(g)}, out.options());
    p.partial = partial.mutable_data_ptr();
    check_launch(launch_depthwise_norm(p, problem.precision, on.stream()), op);
  } else {
    const bool gemm = kernel == Kernel::kGemmNorm;
    const bool fits = gemm ? plan_gemm_norm(p, problem.precision, on.shared_limit())
                           : plan_conv_norm(p, problem.precision, on.shared_limit());
    TORCH_CHECK(fits, op, ": one step of a convolution with stride ", g.stride[1], "×", g.stride[2],
                " does not fit into the ", on.shared_limit(), " bytes of a block's shared memory on this device.");
    partial = at::empty({g.n, p.tiles()}, out.options());
    p.partial = partial.mutable_data_ptr();
    check_launch(gemm ? launch_gemm_norm(p, problem.precision, on.stream())
                      : launch_conv_norm(p, problem.precision, on.stream()),
                 op);
  }
  sum_partials(partial, done, out, on, op);
}

// The distance from the first to the last pixel of a channel, in elements.
int64_t span(const Operand& o, const int (&size)[3]) {
  int64_t elements = 0;
  for (int i = 0; i < 3; ++i) elements += (int64_t(size[i]) - 1) * o.space[i];
  return elements;
}

// The kernel of the Gram form that takes a problem.
Kernel gram_kernel(const Problem& problem) {
  return problem.a.defined() ? Kernel::kGramContraction : Kernel::kGramNorm;
}

// Forms the Gram matrix of every example's rows [n, T, width] into `out` [n, T, T], which is of the sums' type. In TF32
// cuBLAS rounds operands as our kernels do: on an H200 norms were off by 1e-5, and truncation would show as 7e-4.
void gram_matrices(const at::Tensor& rows, at::Tensor out) {
  const at::Tensor columns = rows.transpose(1, 2);
  const at::ScalarType type = out.scalar_type();
  if (rows.scalar_type() == type)
    at::bmm_out(out, rows, columns);
  else if (rows.is_cuda())
    at::bmm_out(out, rows, columns, type);
  else  // the emulator: ATen's CPU has no products of 16 bits with sums of 32
    at::bmm_out(out, rows.to(type), columns.to(type));
}

// What the Gram forms return: which examples of `out` are right [n], or undefined, if they do not take the problem.
// `why` then says what is in the way.

// Of linear layers: ATen multiplies, as many examples at once as the workspace holds.
at::Tensor gram_of_rows(const Problem& problem, const at::Tensor& out, const OnDevice& on, const char* op,
                        std::string* why) {
  constexpr int64_t kBytes = 256 << 20;  // of both matrices of the examples at once
  const int64_t n = problem.a.size(0), T = problem.a.size(1), element = out.element_size();
  if (T > kMostContracted) {
    *why = "its examples have " + std::to_string(T) + " positions, more than " + std::to_string(kMostContracted);
    return {};
  }
  for (const at::Tensor& rows : {problem.a, problem.b}) {  // BLAS counts in 32 bits
    if (std::max(rows.stride(1), rows.stride(2)) <= INT32_MAX) continue;
    *why = "its positions lie more than 2^31 elements apart (a transposed view?)";
    return {};
  }
  const int64_t pitch = gram_pitch(T, element), most = std::max<int64_t>(kBytes / (2 * T * pitch * element), 1);
  const int64_t stretches = (n + most - 1) / most, step = (n + stretches - 1) / stretches;
  const at::Tensor grams = at::empty({2, step, T, pitch}, out.options());
  const at::Tensor reliable = at::empty({n}, out.options().dtype(at::kByte));
  // Products are as exact as the problem's precision, whatever autocast says; where TF32 is allowed for convolutions
  // alone, those of patches are of float32.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  std::optional<at::NoTF32Guard> no_tf32;
  if (problem.precision != Precision::kTf32) no_tf32.emplace();
  for (int64_t begin = 0; begin < n; begin += step) {
    const int64_t count = std::min(step, n - begin);
    for (const auto& [rows, which] : {std::pair(problem.a, 0), std::pair(problem.b, 1)})
      gram_matrices(rows.narrow(0, begin, count), grams.select(0, which).narrow(0, 0, count).narrow(2, 0, T));
    GramContraction c{};
    c.p = grams.select(0, 0).const_data_ptr(), c.q = grams.select(0, 1).const_data_ptr();
    c.out = out.narrow(0, begin, count).mutable_data_ptr();
    c.reliable = reliable.mutable_data_ptr<uint8_t>() + begin;
    c.n = count, c.positions = int(T), c.pitch = int(pitch);
    check_launch(launch_gram_contraction(c, problem.precision, on.stream()), op);
  }
  return reliable;
}

// Of convolutions: over pixels, by a kernel that keeps the Gram matrices on chip.
at::Tensor gram_of_pixels(const Problem& problem, const at::Tensor& out, const OnDevice& on, const char* op,
                          std::string* why) {
  GramNorm p{};
  p.x = problem.x, p.gy = problem.gy, p.geometry = problem.geometry;
  if (span(p.x, p.geometry.in) > INT32_MAX || span(p.gy, p.geometry.out) > INT32_MAX) {
    *why = "an example's pixels lie more than 2^31 elements apart (a transposed view?)";
    return {};
  }
  const int64_t count = plan_gram_norm(p, problem.precision, on.shared_limit());
  if (count <= 0) {
    *why = "it needs more blocks than one launch may have, or more shared memory than this device's blocks have";
    return {};
  }
  const at::Tensor partial = at::empty({p.geometry.n, count}, out.options());
  const at::Tensor reliable = at::empty({p.geometry.n}, out.options().dtype(at::kByte));
  p.partial = partial.mutable_data_ptr(), p.out = out.mutable_data_ptr();
  p.reliable = reliable.mutable_data_ptr<uint8_t>();
  check_launch(launch_gram_norm(p, problem.precision, on.stream()), op);
  return reliable;
}

// Forms squared norms through Gram matrices, and by the direct form where those are not reliable. Returns false if the
// Gram form does not take the problem; `why` then says what is in the way.
bool gram(const Problem& problem, const at::Tensor& out, const OnDevice& on, const char* op, std::string* why) {
  const at::Tensor reliable =
      problem.a.defined() ? gram_of_rows(problem, out, on, op, why) : gram_of_pixels(problem, out, on, op, why);
  if (!reliable.defined()) return false;
  if (!gram_on_its_own()) direct(problem, std::nullopt, nullptr, reliable.const_data_ptr<uint8_t>(), out, on, op);
  return true;
}

// In the form that was `chosen` by the cost model, or by the user, who is told if it cannot be. Returns false if no
// kernel is trusted with the problem; the Gram form needs the direct one behind it.
bool norms(const Problem& problem, const std::optional<CorrectionTensors>& correction, Form chosen, bool forced,
           const at::Tensor& out, const OnDevice& on, const char* op) {
  if (!on.trusts(direct_kernel(problem.geometry), problem.precision)) return false;
  std::string why;
  if (chosen == Form::kGram && !on.trusts(gram_kernel(problem), problem.precision)) chosen = Form::kDirect;
  if (chosen == Form::kGram && gram(problem, out, on, op, &why)) return true;
  TORCH_CHECK(chosen != Form::kGram || !forced, op, ": form=\"gram\" cannot take this layer: ", why,
              ". Use form=\"direct\" or \"auto\".");
  direct(problem, correction, nullptr, nullptr, out, on, op);
  return true;
}

// The same for a linear layer, whose form is also chosen here; a single position is two dot products.
bool norms_of_rows(const Problem& problem, const std::optional<CorrectionTensors>& correction, Form form,
                   const at::Tensor& out, const OnDevice& on, const char* op) {
  const int64_t n = problem.a.size(0), T = problem.a.size(1), p = problem.a.size(2), d = problem.b.size(2);
  Form chosen = form;
  if (chosen == Form::kAuto)
    chosen = linear_cost(T, p, d, cuda_table(problem.a.device().index(), problem.precision)).form;
  if (chosen == Form::kGram && T == 1 && on.trusts(Kernel::kRankOne, problem.precision)) {
    const RankOne one{problem.x, problem.gy, n, narrow(p, op), narrow(d, op), out.mutable_data_ptr()};
    check_launch(launch_rank_one(one, problem.precision, on.stream()), op);
    return true;
  }
  return norms(problem, correction, chosen, form != Form::kAuto, out, on, op);
}

// Whether a corrected norm is formed from an uncorrected one and the layer's response to the correction: the direct
// form's epilogue reads the correlation anew for every example, which took 4 ns for 1,000 elements on an H200, and the
// response costs a forward pass of the layer and some ten launches.
bool expands_in(Form form, const ConvShape& s, const Problem& problem, const OnDevice& on) {
  const bool slow = problem.precision == Precision::kFloat32 || problem.precision == Precision::kFloat64;
  const double elements = double(s.n) * double(s.out_channels) * double(s.channels) * double(s.taps());
  const bool worth = problem.precision != Precision::kFloat16 && s.groups == 1 && s.positions() <= (slow ? 128 : 256) &&
                     elements > 1.5e7;
  if (form == Form::kDirect || (form == Form::kAuto && !worth)) return false;
  return on.trusts(Kernel::kCorrection,
                   problem.precision == Precision::kTf32 ? Precision::kFloat32 : problem.precision);
}

// The layer's response to other weights, and gy, both dense in the same order of memory.
struct Response {
  at::Tensor responses, gy;
  bool channels_last;
};

// Corrects the norms in `out`; `respond` makes the response to weights of the given sizes, whose first is their rows.
template <class Respond>
void expand(const Problem& problem, const CorrectionTensors& correction, const at::Tensor& gy,
            at::IntArrayRef weight_sizes, Respond respond, const at::Tensor& out, const OnDevice& on, const char* op) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t n = problem.geometry.n, d = problem.geometry.rows;
  const at::Tensor weights = at::empty(weight_sizes, gy.options().memory_format(std::nullopt));
  const at::Tensor moments = at::empty({2 * d + 1}, out.options());
  const CorrectionFilters filters{correction.correlation.const_data_ptr(),
                                  correction.patch_mean.const_data_ptr(),
                                  weights.mutable_data_ptr(),
                                  moments.mutable_data_ptr(),
                                  correction.correlation.numel() / d,
                                  int(d),
                                  int(weight_sizes[0]),
                                  element_of(gy)};
  check_launch(launch_correction_filters(filters, on.stream()), op);
  const Response response = respond(weights);
  const at::Tensor done = at::empty({n}, out.options().dtype(at::kByte));
  const ExpandedCorrection p{response.gy.const_data_ptr(),
                             response.responses.const_data_ptr(),
                             moments.const_data_ptr(),
                             correction.shift.const_data_ptr(),
                             correction.scale.const_data_ptr(),
                             out.mutable_data_ptr(),
                             done.mutable_data_ptr<uint8_t>(),
                             n,
                             problem.geometry.positions(),
                             int(d),
                             int(weight_sizes[0]),
                             response.channels_last,
                             element_of(gy)};
  check_launch(launch_expanded_correction(p, on.stream()), op);
  direct(problem, correction, nullptr, done.const_data_ptr<uint8_t>(), out, on, op);
}

// How many rows the weights of a response have, for d rows of the layer's and one more: libraries are fast at eights.
int64_t response_rows(int64_t d) { return (d / 8 + 1) * 8; }

using Grads = std::tuple<at::Tensor, at::Tensor>;  // norm_sq [n], grads

// Nothing if no kernel is trusted with the problem.
std::optional<Grads> grads_of(const ConvShape& s, const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef sizes,
                              bool convolution, const char* op) {
  const OnDevice on(x);
  if (x.numel() == 0 || gy.numel() == 0) return Grads{at::zeros({s.n}, sums_of(x)), at::zeros(sizes, sums_of(x))};
  const Problem problem = problem_of(s, x, gy, convolution, op);
  if (!on.trusts(direct_kernel(problem.geometry), problem.precision)) return std::nullopt;
  const at::Tensor norm_sq = at::empty({s.n}, sums_of(x)), grads = at::empty(sizes, sums_of(x));
  direct(problem, std::nullopt, &grads, nullptr, norm_sq, on, op);
  return Grads{norm_sq, grads};
}

}  // namespace

at::Tensor linear_norm_sq(const at::Tensor& a, const at::Tensor& b, std::string_view form, const OptionalTensor& shift,
                          const OptionalTensor& patch_mean, const OptionalTensor& scale,
                          const OptionalTensor& correlation) {
  constexpr const char* op = "linear_norm_sq";
  const ConvShape s = linear_shape(a, b, op);
  const at::ScalarType type = compute_type(a, b, op);
  const int64_t n = a.size(0), T = a.size(1), p = a.size(2), d = b.size(2);
  const OnDevice on(a);
  const auto correction =
      read_correction(shift, patch_mean, scale, correlation, type, a.device(), {n, d}, {p}, {d, p}, op);
  const Form chosen = parse_form(form);
  if (n == 0 || p == 0 || d == 0 || (T == 0 && !correction)) return at::zeros({n}, sums_of(a));
  const at::Tensor out = at::empty({n}, sums_of(a));
  const Problem problem = problem_of_rows(s, a, b, false, op);
  const bool expands = correction && T > 0 && expands_in(chosen, s, problem, on);
  if (expands ? norms_of_rows(problem, std::nullopt, chosen, out, on, op)
              : norms_of_rows(problem, correction, correction ? Form::kDirect : chosen, out, on, op)) {
    const auto respond = [&](const at::Tensor& weights) {
      return Response{at::matmul(a, weights.t()).contiguous(), b.contiguous(), true};
    };
    if (expands) expand(problem, *correction, b, {response_rows(d), p}, respond, out, on, op);
    return out;
  }
  return aten::linear_norm_sq(a, b, form, shift, patch_mean, scale, correlation);
}

at::Tensor conv_norm_sq(const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, std::string_view form,
                        const OptionalTensor& shift, const OptionalTensor& patch_mean, const OptionalTensor& scale,
                        const OptionalTensor& correlation) {
  constexpr const char* op = "conv_norm_sq";
  const ConvShape s = conv_shape(x, gy, kernel_size, stride, padding, dilation, groups, op);
  const at::ScalarType type = compute_type(x, gy, op);
  const OnDevice on(x);
  const auto correction = read_correction(shift, patch_mean, scale, correlation, type, x.device(), s, kernel_size, op);
  Form chosen = parse_form(form);
  const bool forced = chosen != Form::kAuto;
  if (x.numel() == 0 || gy.numel() == 0) return at::zeros({s.n}, sums_of(x));
  const at::Tensor out = at::empty({s.n}, sums_of(x));
  if (reads_patches(s.kernel, s.stride, s.padding, s.dilation, groups) && !correction) {
    const at::Tensor a = patches_of(s, x), b = gy.flatten(2).transpose(1, 2);
    const Problem rows = problem_of_rows(linear_shape(a, b, op), a, b, true, op);
    if (norms_of_rows(rows, std::nullopt, chosen, out, on, op)) return out;
    return aten::conv_norm_sq(x, gy, kernel_size, stride, padding, dilation, groups, form, {}, {}, {}, {});
  }
  const Problem problem = problem_of(s, x, gy, true, op);
  TORCH_CHECK(!correction || chosen != Form::kGram || groups == 1, op,
              ": form=\"gram\" takes a batch-norm correction "
              "with groups=1 only, got groups=",
              groups, ". Use form=\"direct\" or \"auto\".");
  const bool expands = correction && expands_in(chosen, s, problem, on);
  if (correction && !expands) chosen = Form::kDirect;
  if (chosen == Form::kAuto)
    chosen = conv_cost(s.channels, s.out_channels, s.kernel, s.stride, s.padding, s.dilation, groups, s.in, s.out,
                       channels_last(x), cuda_table(x.device().index(), problem.precision))
                 .form;
  if (norms(problem, expands ? std::nullopt : correction, chosen, forced, out, on, op)) {
    std::vector<int64_t> sizes{response_rows(s.out_channels), s.channels};
    sizes.insert(sizes.end(), kernel_size.begin(), kernel_size.end());
    const auto respond = [&](const at::Tensor& weights) {
      const std::vector<int64_t> none(kernel_size.size(), 0);
      const at::Tensor found = at::convolution(x, weights, {}, stride, padding, dilation, false, none, 1);
      const at::MemoryFormat order = found.suggest_memory_format();
      return Response{found.contiguous(order), gy.contiguous(order), order != at::MemoryFormat::Contiguous};
    };
    if (expands) expand(problem, *correction, gy, sizes, respond, out, on, op);
    return out;
  }
  return aten::conv_norm_sq(x, gy, kernel_size, stride, padding, dilation, groups, form, shift, patch_mean, scale,
                            correlation);
}

std::tuple<at::Tensor, at::Tensor> linear_grads(const at::Tensor& a, const at::Tensor& b) {
  const ConvShape s = linear_shape(a, b, "linear_grads");
  compute_type(a, b, "linear_grads");
  const auto grads =
      grads_of(s, a.transpose(1, 2), b.transpose(1, 2), {s.n, s.out_channels, s.channels}, false, "linear_grads");
  return grads ? *grads : aten::linear_grads(a, b);
}

std::tuple<at::Tensor, at::Tensor> conv_grads(const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef kernel_size,
                                              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                              int64_t groups) {
  const ConvShape s = conv_shape(x, gy, kernel_size, stride, padding, dilation, groups, "conv_grads");
  compute_type(x, gy, "conv_grads");
  std::vector<int64_t> sizes{s.n, s.out_channels, s.group_channels()};
  sizes.insert(sizes.end(), kernel_size.begin(), kernel_size.end());
  const auto grads = [&] {
    if (!reads_patches(s.kernel, s.stride, s.padding, s.dilation, groups))
      return grads_of(s, x, gy, sizes, true, "conv_grads");
    const at::Tensor a = patches_of(s, x), lines = gy.flatten(2);
    return grads_of(linear_shape(a, lines.transpose(1, 2), "conv_grads"), a.transpose(1, 2), lines, sizes, true,
                    "conv_grads");
  }();
  return grads ? *grads : aten::conv_grads(x, gy, kernel_size, stride, padding, dilation, groups);
}

}  // namespace engm::cuda
