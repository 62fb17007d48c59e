// Serves linear_norm_sq, conv_norm_sq, linear_grads and conv_grads on the CPU: checks operands, chooses the form, and
// goes back to the direct form for examples whose Gram terms cancel. A linear layer is a convolution with one tap over
// T positions.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>

#include <numeric>

#include "../ops.h"
#include "shape.h"

namespace engm::cpu {
namespace {

template <typename T>
Operand<T> operand(const at::Tensor& t) {  // [n, channels, *space]
  Operand<T> o{t.const_data_ptr<T>(), t.stride(0), t.stride(1), {0, 0, 0}};
  for (int64_t i = 2; i < t.dim(); ++i) o.space[3 - t.dim() + i] = t.stride(i);
  return o;
}

// Turns a 1×1 convolution, which reads every stride-th pixel, into a dense problem over a strided view.
template <typename T>
void drop_unread_pixels(ConvShape& s, Operand<T>& x) {
  for (int i = 0; i < 3; ++i) {
    if (s.kernel[i] != 1 || s.padding[i] != 0) continue;
    x.space[i] *= s.stride[i];
    s.in[i] = s.out[i];
    s.stride[i] = s.dilation[i] = 1;
  }
}

template <typename T>
void squared_norms(ConvShape s, Operand<T> x, const Operand<T>& gy, const Correction<T>* correction, Form form,
                   double* out) {
  drop_unread_pixels(s, x);
  std::vector<int64_t> examples;
  if (form == Form::kGram) {
    std::vector<uint8_t> reliable(s.n);
    gram_norms(s, x, gy, out, reliable.data());
    for (int64_t i = 0; i < s.n; ++i)
      if (!reliable[i]) examples.push_back(i);
  } else {
    for (int64_t i = 0; i < s.n; ++i) examples.push_back(i);
  }
  if (!examples.empty()) direct_norms<T>(s, x, gy, correction, examples, out, nullptr);
}

template <typename T>
Correction<T> correction_of(const CorrectionTensors& t) {
  return {t.shift.template const_data_ptr<T>(), t.scale.template const_data_ptr<T>(),
          t.patch_mean.template const_data_ptr<T>(), t.correlation.template const_data_ptr<T>()};
}

template <typename T>
at::Tensor run(const ConvShape& s, const at::Tensor& x, const at::Tensor& gy,
               const std::optional<CorrectionTensors>& tensors, Form form) {
  at::Tensor out = at::empty({s.n}, x.options());
  std::vector<double> total(s.n, 0.0);
  if (tensors) {
    const Correction<T> correction = correction_of<T>(*tensors);
    squared_norms<T>(s, operand<T>(x), operand<T>(gy), &correction, form, total.data());
  } else {
    squared_norms<T>(s, operand<T>(x), operand<T>(gy), nullptr, form, total.data());
  }
  std::copy(total.begin(), total.end(), out.mutable_data_ptr<T>());
  return out;
}

at::Tensor dispatch(const ConvShape& s, const at::Tensor& x, const at::Tensor& gy,
                    const std::optional<CorrectionTensors>& correction, Form form) {
  if (x.scalar_type() == at::kDouble) return run<double>(s, x, gy, correction, form);
  return run<float>(s, x, gy, correction, form);
}

using Grads = std::tuple<at::Tensor, at::Tensor>;  // norm_sq [n], grads

template <typename T>
Grads run_grads(ConvShape s, const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef sizes) {
  at::Tensor norm_sq = at::empty({s.n}, x.options()), grads = at::empty(sizes, x.options());
  std::vector<int64_t> examples(s.n);
  std::iota(examples.begin(), examples.end(), 0);
  std::vector<double> total(s.n, 0.0);
  Operand<T> from = operand<T>(x);
  drop_unread_pixels(s, from);
  direct_norms<T>(s, from, operand<T>(gy), nullptr, examples, total.data(), grads.mutable_data_ptr<T>());
  std::copy(total.begin(), total.end(), norm_sq.mutable_data_ptr<T>());
  return {norm_sq, grads};
}

Grads dispatch_grads(const ConvShape& s, const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef sizes) {
  if (x.numel() == 0 || gy.numel() == 0) return {at::zeros({s.n}, x.options()), at::zeros(sizes, x.options())};
  return x.scalar_type() == at::kDouble ? run_grads<double>(s, x, gy, sizes) : run_grads<float>(s, x, gy, sizes);
}

// Serves T = 1, where ‖b aᵀ‖² = ‖a‖²‖b‖²: reads a [n, 1, p] and b [n, 1, d] once.
template <typename T>
at::Tensor rank_one(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor dense_a = a.contiguous(), dense_b = b.contiguous();
  const T *const rows_a = dense_a.const_data_ptr<T>(), *const rows_b = dense_b.const_data_ptr<T>();
  const int64_t p = a.size(2), d = b.size(2);
  at::Tensor out = at::empty({a.size(0)}, a.options());
  const Kernels<T>& k = kernels<T>();
  const auto norm_sq = [&](const T* row, int64_t length) {
    double sum = 0, magnitude = 0;
    k.dot(row, row, length, &sum, &magnitude);
    return sum;
  };
  T* const norms = out.mutable_data_ptr<T>();
  at::parallel_for(0, a.size(0), grain(p + d, kGrainElements), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      norms[i] = static_cast<T>(norm_sq(rows_a + i * p, p) * norm_sq(rows_b + i * d, d));
  });
  return out;
}

// Up to how many positions a corrected norm is cheaper as three sums than in direct form, which reads the correction
// anew for every example: of 256 to 256 features it takes a tenth of the time at T = 1, and two thirds at T = 8.
constexpr int64_t kFewPositions = 8;

// ‖G_i - S_i‖² = ‖G_i‖² - 2 <G_i, S_i> + ‖S_i‖², with S_i[o] = shift[i, o]·mean + scale[i, o]·correlation[o].
struct ThreeSums {
  at::Tensor total, magnitude;  // [n] float64: their sum, and the sum of their absolute values
};

ThreeSums three_sums(const at::Tensor& a, const at::Tensor& b, const CorrectionTensors& c) {
  const AsWritten as_written;
  const at::Tensor gradients = linear_norm_sq(a, b, "auto", {}, {}, {}, {}).to(at::kDouble);
  at::Tensor along = at::matmul(a, c.correlation.t());  // [n, T, d]
  along.mul_(c.scale.unsqueeze(1)).addcmul_(at::matmul(a, c.patch_mean).unsqueeze(2), c.shift.unsqueeze(1)).mul_(b);
  const at::Tensor cross = along.sum({1, 2}, false, at::kDouble).mul_(2);
  at::Tensor own = at::mv(c.scale.square(), c.correlation.square().sum(1));
  own.addmv_(c.shift * c.scale, at::mv(c.correlation, c.patch_mean), 1, 2);
  own.add_(c.shift.square().sum(1) * c.patch_mean.square().sum());
  own = own.to(at::kDouble);
  return {gradients - cross + own, gradients + cross.abs() + own};
}

template <typename T>
at::Tensor corrected_by_sums(const ConvShape& s, const at::Tensor& a, const at::Tensor& b, const CorrectionTensors& c) {
  const ThreeSums sums = three_sums(a, b, c);
  std::vector<double> total(sums.total.const_data_ptr<double>(), sums.total.const_data_ptr<double>() + s.n);
  const double* const magnitude = sums.magnitude.const_data_ptr<double>();
  std::vector<int64_t> cancelled;
  for (int64_t i = 0; i < s.n; ++i)
    if (magnitude[i] > kMaxCancellation<T> * total[i]) cancelled.push_back(i);
  if (!cancelled.empty()) {
    const Correction<T> correction = correction_of<T>(c);
    for (int64_t i : cancelled) total[i] = 0;
    direct_norms<T>(s, operand<T>(a.transpose(1, 2)), operand<T>(b.transpose(1, 2)), &correction, cancelled,
                    total.data(), nullptr);
  }
  at::Tensor out = at::empty({s.n}, a.options());
  std::copy(total.begin(), total.end(), out.mutable_data_ptr<T>());
  return out;
}

// The form that the user named. A correction is an epilogue of the direct form.
Form form_of(std::string_view name, bool corrected) {
  const Form form = parse_form(name);
  TORCH_CHECK(!corrected || form != Form::kGram,
              "form=\"gram\" has no batch-norm correction on the CPU. Use form=\"auto\" or \"direct\" with one.");
  return corrected ? Form::kDirect : form;
}

}  // namespace

at::Tensor linear_norm_sq(const at::Tensor& a_in, const at::Tensor& b_in, std::string_view form,
                          const OptionalTensor& shift, const OptionalTensor& patch_mean, const OptionalTensor& scale,
                          const OptionalTensor& correlation) {
  const ConvShape s = linear_shape(a_in, b_in, "linear_norm_sq");
  const at::ScalarType type = compute_type(a_in, b_in, "linear_norm_sq");
  const int64_t n = a_in.size(0), T = a_in.size(1), p = a_in.size(2), d = b_in.size(2);
  const auto correction = read_correction(shift, patch_mean, scale, correlation, type, a_in.device(), {n, d}, {p},
                                          {d, p}, "linear_norm_sq");
  Form chosen = form_of(form, correction.has_value());
  const at::Tensor a = as_type(a_in, type), b = as_type(b_in, type);
  if (n == 0 || p == 0 || d == 0 || (T == 0 && !correction)) return at::zeros({n}, a.options());
  if (T == 1 && !correction && chosen != Form::kDirect)
    return type == at::kDouble ? rank_one<double>(a, b) : rank_one<float>(a, b);
  if (correction && form == "auto" && 0 < T && T <= kFewPositions)
    return type == at::kDouble ? corrected_by_sums<double>(s, a, b, *correction)
                               : corrected_by_sums<float>(s, a, b, *correction);
  if (chosen == Form::kAuto) chosen = linear_cost(T, p, d).form;
  return dispatch(s, a.transpose(1, 2), b.transpose(1, 2), correction, chosen);
}

at::Tensor conv_norm_sq(const at::Tensor& x_in, const at::Tensor& gy_in, at::IntArrayRef kernel_size,
                        at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                        std::string_view form, const OptionalTensor& shift, const OptionalTensor& patch_mean,
                        const OptionalTensor& scale, const OptionalTensor& correlation) {
  const ConvShape s =
      conv_shape(x_in, gy_in, kernel_size, stride, padding, dilation, groups, "conv_norm_sq");
  const at::ScalarType type = compute_type(x_in, gy_in, "conv_norm_sq");
  const auto correction =
      read_correction(shift, patch_mean, scale, correlation, type, x_in.device(), s, kernel_size, "conv_norm_sq");
  Form chosen = form_of(form, correction.has_value());
  const at::Tensor x = as_type(x_in, type), gy = as_type(gy_in, type);
  if (x.numel() == 0 || gy.numel() == 0) return at::zeros({s.n}, x.options());
  if (chosen == Form::kAuto)
    chosen = conv_cost(s.channels, s.out_channels, s.kernel, s.stride, s.padding, s.dilation, groups, s.in, s.out,
                       channels_last(x))
                 .form;
  return dispatch(s, x, gy, correction, chosen);
}

std::tuple<at::Tensor, at::Tensor> linear_grads(const at::Tensor& a, const at::Tensor& b) {
  const ConvShape s = linear_shape(a, b, "linear_grads");
  const at::ScalarType type = compute_type(a, b, "linear_grads");
  return dispatch_grads(s, as_type(a, type).transpose(1, 2), as_type(b, type).transpose(1, 2),
                        {s.n, s.out_channels, s.channels});
}

std::tuple<at::Tensor, at::Tensor> conv_grads(const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef kernel_size,
                                              at::IntArrayRef stride, at::IntArrayRef padding,
                                              at::IntArrayRef dilation, int64_t groups) {
  const ConvShape s = conv_shape(x, gy, kernel_size, stride, padding, dilation, groups, "conv_grads");
  const at::ScalarType type = compute_type(x, gy, "conv_grads");
  std::vector<int64_t> sizes{s.n, s.out_channels, s.group_channels()};
  sizes.insert(sizes.end(), kernel_size.begin(), kernel_size.end());
  return dispatch_grads(s, as_type(x, type), as_type(gy, type), sizes);
}

}  // namespace engm::cpu
