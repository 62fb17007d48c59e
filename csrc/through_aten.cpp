// The operators composed of ATen's, in the precision of their operands, sums in float32 or float64: slower than kernels
// and plainly right, on any device.
//
// Gradients are formed whole, of as many examples at once as may be, or of one.
#include <ATen/Functions.h>

#include <algorithm>
#include <atomic>

#include "elementwise_checks.h"
#include "ops.h"

namespace engm::aten {
namespace {

std::atomic<int64_t> elements_at_once{1 << 26};

int64_t examples_at_once(int64_t n, int64_t elements_each) {
  return std::clamp<int64_t>(elements_at_once / std::max<int64_t>(elements_each, 1), 1, std::max<int64_t>(n, 1));
}

// The patches of images x [n, C, in] under every tap: [n·groups, C/groups·taps, T].
at::Tensor patches_of(const ConvShape& s, const at::Tensor& x_in) {
  at::Tensor x = x_in.reshape({x_in.size(0), s.channels, s.in[0], s.in[1], s.in[2]});
  x = at::constant_pad_nd(
      x, {s.padding[2], s.padding[2], s.padding[1], s.padding[1], s.padding[0], s.padding[0]}).contiguous();
  const int64_t channel = x.stride(1), z = x.stride(2), y = x.stride(3), n = x.size(0);
  const at::Tensor view = x.as_strided(
      {n, s.channels, s.kernel[0], s.kernel[1], s.kernel[2], s.out[0], s.out[1], s.out[2]},
      {x.stride(0), channel, s.dilation[0] * z, s.dilation[1] * y, s.dilation[2], s.stride[0] * z, s.stride[1] * y,
       s.stride[2]});
  return view.reshape({n * s.groups, s.group_channels() * s.taps(), s.positions()});
}

// Calls `take(begin, end, grads)` for one stretch of the examples after the other, grads [examples, d, C/groups·taps]
// in the type of sums.
template <class Take>
void each_stretch(const ConvShape& s, const at::Tensor& x, const at::Tensor& gy, at::ScalarType type, Take take) {
  const int64_t width = s.group_channels() * s.taps(), step = examples_at_once(
      s.n, width * (s.groups * s.positions() + s.out_channels) + s.out_channels * s.positions());
  for (int64_t begin = 0; begin < s.n; begin += step) {
    const int64_t count = std::min(step, s.n - begin);
    const at::Tensor patches = patches_of(s, x.narrow(0, begin, count).to(type));
    const at::Tensor rows = gy.narrow(0, begin, count).to(type).reshape(
        {count * s.groups, s.group_rows(), s.positions()});
    take(begin, count, at::bmm(rows, patches.transpose(1, 2)).view({count, s.out_channels, width}));
  }
}

at::Tensor squares(const at::Tensor& grads) { return at::sum(at::mul(grads, grads), at::IntArrayRef{1, 2}); }

at::Tensor norms_of(const ConvShape& s, const at::Tensor& x, const at::Tensor& gy, at::ScalarType type,
                    const std::optional<CorrectionTensors>& correction) {
  const at::Tensor out = at::zeros({s.n}, gy.options().dtype(type).memory_format(std::nullopt));
  if (s.positions() == 0 && !correction) return out;
  const int64_t width = s.group_channels() * s.taps();
  each_stretch(s, x, gy, type, [&](int64_t begin, int64_t count, at::Tensor grads) {
    if (correction) {
      const at::Tensor mean = at::repeat_interleave(correction->patch_mean.view({s.groups, width}), s.group_rows(), 0);
      const auto of_examples = [&](const at::Tensor& t) { return t.narrow(0, begin, count).unsqueeze(2); };
      grads = at::sub(grads, at::mul(of_examples(correction->shift), mean));
      grads = at::sub(grads, at::mul(of_examples(correction->scale),
                                     correction->correlation.view({s.out_channels, width})));
    }
    out.narrow(0, begin, count).copy_(squares(grads));
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> grads_of(const ConvShape& s, const at::Tensor& x, const at::Tensor& gy,
                                            at::ScalarType type, at::IntArrayRef sizes) {
  const auto options = gy.options().dtype(type).memory_format(std::nullopt);
  const at::Tensor norm_sq = at::zeros({s.n}, options), grads = at::zeros(sizes, options);
  const at::Tensor rows = grads.view({s.n, s.out_channels, s.group_channels() * s.taps()});
  each_stretch(s, x, gy, type, [&](int64_t begin, int64_t count, const at::Tensor& found) {
    rows.narrow(0, begin, count).copy_(found);
    norm_sq.narrow(0, begin, count).copy_(squares(found));
  });
  return {norm_sq, grads};
}

at::Tensor as_line(const at::Tensor& rows) { return rows.transpose(1, 2); }  // [n, T, p] -> [n, p, T]

}  // namespace

void form_at_once(int64_t elements) { elements_at_once = elements; }

at::Tensor linear_norm_sq(const at::Tensor& a, const at::Tensor& b, std::string_view form, const OptionalTensor& shift,
                          const OptionalTensor& patch_mean, const OptionalTensor& scale,
                          const OptionalTensor& correlation) {
  const AsWritten as_written;
  const ConvShape s = linear_shape(a, b, "linear_norm_sq");
  const at::ScalarType type = compute_type(a, b, "linear_norm_sq");
  const auto correction =
      read_correction(shift, patch_mean, scale, correlation, type, a.device(), {s.n, s.out_channels}, {s.channels},
                      {s.out_channels, s.channels}, "linear_norm_sq");
  parse_form(form);
  return norms_of(s, as_line(a), as_line(b), type, correction);
}

at::Tensor conv_norm_sq(const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, std::string_view form,
                        const OptionalTensor& shift, const OptionalTensor& patch_mean, const OptionalTensor& scale,
                        const OptionalTensor& correlation) {
  const AsWritten as_written;
  const ConvShape s = conv_shape(x, gy, kernel_size, stride, padding, dilation, groups, "conv_norm_sq");
  const at::ScalarType type = compute_type(x, gy, "conv_norm_sq");
  const auto correction =
      read_correction(shift, patch_mean, scale, correlation, type, x.device(), s, kernel_size, "conv_norm_sq");
  parse_form(form);
  return norms_of(s, x, gy, type, correction);
}

std::tuple<at::Tensor, at::Tensor> linear_grads(const at::Tensor& a, const at::Tensor& b) {
  const AsWritten as_written;
  const ConvShape s = linear_shape(a, b, "linear_grads");
  return grads_of(s, as_line(a), as_line(b), compute_type(a, b, "linear_grads"), {s.n, s.out_channels, s.channels});
}

std::tuple<at::Tensor, at::Tensor> conv_grads(const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef kernel_size,
                                              at::IntArrayRef stride, at::IntArrayRef padding,
                                              at::IntArrayRef dilation, int64_t groups) {
  const AsWritten as_written;
  const ConvShape s = conv_shape(x, gy, kernel_size, stride, padding, dilation, groups, "conv_grads");
  std::vector<int64_t> sizes{s.n, s.out_channels, s.group_channels()};
  sizes.insert(sizes.end(), kernel_size.begin(), kernel_size.end());
  return grads_of(s, x, gy, compute_type(x, gy, "conv_grads"), sizes);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> affine_norm_sq(const at::Tensor& x, const at::Tensor& gy_in,
                                                              const OptionalTensor& mean, const at::Tensor& rstd,
                                                              int64_t channel_dim) {
  const AsWritten as_written;
  const at::ScalarType type = compute_type(x, gy_in, "affine_norm_sq");
  const at::Tensor gy = gy_in.to(type), centred = mean ? at::sub(x.to(type), mean->to(type)) : x.to(type);
  const int64_t positions = 3 - channel_dim;
  const at::Tensor scale = at::sum(at::mul(gy, at::mul(centred, rstd.to(type))), at::IntArrayRef{positions});
  const at::Tensor shift = at::sum(gy, at::IntArrayRef{positions});
  return {at::stack({at::sum(at::mul(scale, scale), at::IntArrayRef{1}), at::sum(at::mul(shift, shift), at::IntArrayRef{1})}),
          scale, shift};
}

std::tuple<at::Tensor, at::Tensor> clip_weights(const at::Tensor& squared_norms, double alpha,
                                                const OptionalTensor& factors_in) {
  const AsWritten as_written;
  const OptionalTensor factors = check_clip(squared_norms, alpha, factors_in);
  const at::Tensor wide = squared_norms.to(at::kDouble);
  const at::Tensor total = at::sum(factors ? at::mul(wide, factors->unsqueeze(1)) : wide, at::IntArrayRef{0});
  const at::Tensor nan = at::full({}, NAN, total.options());
  const at::Tensor norms = at::where(at::eq(total, -INFINITY), nan, at::sqrt(at::clamp_min(total, 0)));
  const at::Tensor clipped = at::where(at::le(norms, alpha), at::ones_like(norms), at::mul(at::reciprocal(norms), alpha));
  const at::Tensor weights = at::where(at::isfinite(total), clipped, nan);
  const at::ScalarType type = squared_norms.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return {norms.to(type), weights.to(type)};
}

at::Tensor embedding_norm_sq(const at::Tensor& indices_in, const at::Tensor& gy_in, int64_t padding_idx) {
  const AsWritten as_written;
  const at::ScalarType type = check_embedding(indices_in, gy_in);
  const int64_t n = gy_in.size(0), positions = gy_in.size(1), channels = gy_in.size(2);
  const at::Tensor out = at::zeros({n}, gy_in.options().dtype(type).memory_format(std::nullopt));
  if (gy_in.numel() == 0) return out;
  const int64_t step = examples_at_once(n, 4 * positions * channels);
  for (int64_t begin = 0; begin < n; begin += step) {
    const int64_t count = std::min(step, n - begin);
    // Positions in the order of their rows; those of one row are added up where the first of them is.
    const auto [rows, order] = at::sort(indices_in.narrow(0, begin, count).to(at::kLong), 1);
    const at::Tensor first = at::ne(rows.narrow(1, 1, positions - 1), rows.narrow(1, 0, positions - 1));
    const at::Tensor place = at::constant_pad_nd(at::cumsum(first.to(at::kLong), 1), {1, 0}).unsqueeze(2);
    at::Tensor gy = gy_in.narrow(0, begin, count).to(type);
    gy = at::gather(gy, 1, order.unsqueeze(2).expand_as(gy));
    if (padding_idx >= 0) gy = at::masked_fill(gy, at::eq(rows, padding_idx).unsqueeze(2), 0);
    out.narrow(0, begin, count).copy_(squares(at::scatter_add(at::zeros_like(gy), 1, place.expand_as(gy), gy)));
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> correction_factors(const at::Tensor& outputs, const at::Tensor& mean,
                                                                  const at::Tensor& rstd, const at::Tensor& gain_in,
                                                                  const at::Tensor& shift, const at::Tensor& scale) {
  const AsWritten as_written;
  const at::ScalarType type = check_correction(outputs, mean, rstd, gain_in, shift, scale);
  const double root = std::sqrt(double(outputs.size(0)) * outputs.size(2));
  const auto of_channels = [&](const at::Tensor& t) { return t.to(type).view({1, -1, 1}); };
  const at::Tensor centred = at::sub(outputs.to(type), of_channels(mean)), gain = gain_in.to(type);
  const at::Tensor normalised = at::mul(centred, at::div(of_channels(rstd), root));
  const at::Tensor like = is_dense_by_position(outputs) ? outputs : outputs.contiguous();
  return {at::empty_like(like).copy_(normalised), at::mul(shift.to(type), gain),
          at::mul(scale.to(type), at::div(gain, root))};
}

at::Tensor patch_mean(const at::Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation) {
  const AsWritten as_written;
  ConvShape s = patch_shape(x, kernel_size, stride, padding, dilation, "patch_mean");
  const at::ScalarType type = compute_type(x, x, "patch_mean");
  std::vector<int64_t> sizes{s.channels};
  sizes.insert(sizes.end(), kernel_size.begin(), kernel_size.end());
  if (s.n == 0 || s.positions() == 0) return at::zeros(sizes, x.options().dtype(type).memory_format(std::nullopt));
  s.n = 1;
  const at::Tensor patches = patches_of(s, at::mean(x, at::IntArrayRef{0}, true, type));
  return at::mean(patches.view({s.channels, s.taps(), s.positions()}), at::IntArrayRef{2}).view(sizes);
}

std::vector<at::Tensor> scale_examples(at::TensorList tensors, const at::Tensor& weights) {
  const AsWritten as_written;
  check_examples(tensors, weights, "scale_examples");
  std::vector<at::Tensor> out;
  for (const at::Tensor& given : tensors) {
    const at::Tensor t = is_dense_by_example(given) ? given : given.contiguous();
    const at::ScalarType type = compute_type(t, t, "scale_examples");
    std::vector<int64_t> shape(t.dim(), 1);
    shape[0] = t.size(0);
    out.push_back(at::mul(t.to(type), weights.to(type).view(shape)).to(t.scalar_type()));
  }
  return out;
}

std::vector<at::Tensor> weighted_sums(at::TensorList tensors, const at::Tensor& weights) {
  const AsWritten as_written;
  check_examples(tensors, weights, "weighted_sums");
  std::vector<at::Tensor> out;
  for (const at::Tensor& t : tensors) {
    const at::ScalarType type = compute_type(t, t, "weighted_sums");
    const at::Tensor rows = t.to(type).reshape({t.size(0), c10::multiply_integers(t.sizes().slice(1))});
    out.push_back(at::mv(rows.t(), weights.to(type)).view(t.sizes().slice(1)));
  }
  return out;
}

at::Tensor weighted_gemm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& weights) {
  const AsWritten as_written;
  return scaled_accumulate(a, b, weights);
}

}  // namespace engm::aten
