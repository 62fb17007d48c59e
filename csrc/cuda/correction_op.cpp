// Binds correction_factors and patch_mean on CUDA: checks operands, settles their layout, allocates outputs.
#include "correction.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <utility>

#include "../elementwise_checks.h"
#include "../ops.h"
#include "../precision.h"
#include "element_type.h"
#include "stream.h"
#include "weighting.h"

namespace engm::cuda {

std::tuple<at::Tensor, at::Tensor, at::Tensor> correction_factors(const at::Tensor& outputs, const at::Tensor& mean_in,
                                                                  const at::Tensor& rstd_in, const at::Tensor& gain_in,
                                                                  const at::Tensor& shift_in,
                                                                  const at::Tensor& scale_in) {
  const at::ScalarType type = check_correction(outputs, mean_in, rstd_in, gain_in, shift_in, scale_in);
  const OnDevice on(outputs);
  if (!on.trusts(Kernel::kCorrection, precision_of(outputs.scalar_type())))
    return aten::correction_factors(outputs, mean_in, rstd_in, gain_in, shift_in, scale_in);
  const at::Tensor y = is_dense_by_position(outputs) ? outputs : outputs.contiguous();
  const auto ready = [&](const at::Tensor& t) { return t.to(type).contiguous(); };
  const at::Tensor mean = ready(mean_in), rstd = ready(rstd_in), gain = ready(gain_in), shift = ready(shift_in),
                   scale = ready(scale_in);
  at::Tensor normalised = at::empty_like(y), gained_shift = at::empty_like(shift), gained_scale = at::empty_like(scale);
  const int64_t n = y.size(0), channels = y.size(1), positions = y.size(2);
  TORCH_CHECK(channels * positions < kMostOfExample, "correction_factors: expected fewer than 2^31 - 8192 elements an "
              "example, got outputs ", outputs.sizes(), ".");
  const bool channels_last = !y.is_contiguous();
  bool aligned = (channels_last ? channels : positions) * y.element_size() % 16 == 0;
  for (const at::Tensor* t : {&y, &std::as_const(normalised)}) aligned &= is_aligned_16(t->const_data_ptr());
  for (const at::Tensor* t : {&mean, &rstd}) aligned &= !channels_last || is_aligned_16(t->const_data_ptr());
  const CorrectionFactors problem{y.const_data_ptr(),
                                  normalised.mutable_data_ptr(),
                                  mean.const_data_ptr(),
                                  rstd.const_data_ptr(),
                                  gain.const_data_ptr(),
                                  shift.const_data_ptr(),
                                  scale.const_data_ptr(),
                                  gained_shift.mutable_data_ptr(),
                                  gained_scale.mutable_data_ptr(),
                                  n,
                                  channels,
                                  positions,
                                  1 / std::sqrt(double(n) * positions),
                                  element_of(y),
                                  channels_last,
                                  aligned};
  check_launch(launch_correction_factors(problem, on.stream()), "correction_factors");
  return {normalised, gained_shift, gained_scale};
}

at::Tensor patch_mean(const at::Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation) {
  const ConvShape s = patch_shape(x, kernel_size, stride, padding, dilation, "patch_mean");
  const at::ScalarType type = compute_type(x, x, "patch_mean");
  const OnDevice on(x);
  if (!on.trusts(Kernel::kCorrection, precision_of(x.scalar_type())))
    return aten::patch_mean(x, kernel_size, stride, padding, dilation);
  std::vector<int64_t> sizes{s.channels};
  sizes.insert(sizes.end(), kernel_size.begin(), kernel_size.end());
  const auto options = x.options().dtype(type).memory_format(std::nullopt);
  if (s.n == 0 || s.positions() == 0 || s.channels == 0) return at::empty(sizes, options).zero_();
  TORCH_CHECK(s.pixels() < INT32_MAX - 256 && ConvShape::volume(s.padded()) < INT32_MAX && s.taps() < INT32_MAX,
              "patch_mean: expected images of fewer than 2^31 pixels, got x ", x.sizes(), ".");
  const auto is_last = [](const at::Tensor& t) { return t.movedim(1, -1).is_contiguous(); };
  const at::Tensor dense = x.is_contiguous() || is_last(x) ? x : x.contiguous();
  const int64_t per_example = s.channels * s.pixels();
  const at::Tensor totals = at::empty({per_example}, options), sums = at::empty(sizes, options);
  WeightedTensors all{};
  const bool aligned = is_aligned_16(dense.const_data_ptr()) && per_example * x.element_size() % 16 == 0;
  all.tensor[0] = {dense.const_data_ptr(), totals.mutable_data_ptr(), per_example, element_of(x), aligned};
  all.n = s.n, all.count = 1, all.weights_are_double = type == at::kDouble;
  check_launch(launch_weighted_sums(all, on.stream()), "patch_mean");
  PatchMean p{};
  for (int i = 0; i < 3; ++i) {
    p.geometry.in[i] = int(s.in[i]), p.geometry.out[i] = int(s.out[i]), p.geometry.kernel[i] = int(s.kernel[i]);
    p.geometry.stride[i] = int(s.stride[i]), p.geometry.padding[i] = int(s.padding[i]);
    p.geometry.dilation[i] = int(s.dilation[i]);
  }
  p.totals = totals.const_data_ptr(), p.sums = sums.mutable_data_ptr(), p.channels = s.channels;
  p.share = 1.0 / (double(s.n) * s.positions());
  p.is_double = type == at::kDouble, p.channels_last = !dense.is_contiguous();
  check_launch(launch_patch_mean(p, on.stream()), "patch_mean");
  return sums;
}

}  // namespace engm::cuda
