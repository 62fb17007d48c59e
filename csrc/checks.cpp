// Checks operands before any device computes with them.
#include "checks.h"

namespace engm {

std::optional<CorrectionTensors> read_correction(const OptionalTensor& shift, const OptionalTensor& patch_mean,
                                                 const OptionalTensor& scale, const OptionalTensor& correlation,
                                                 at::ScalarType type, at::Device device, at::IntArrayRef per_example,
                                                 at::IntArrayRef mean_shape, at::IntArrayRef weight_shape,
                                                 const char* op) {
  const int given = shift.has_value() + patch_mean.has_value() + scale.has_value() + correlation.has_value();
  if (given == 0) return std::nullopt;
  TORCH_CHECK(given == 4, op, ": a batch-norm correction needs all of shift, patch_mean, scale and correlation, got ",
              given, " of the four. Pass the missing ones or none.");
  const auto ready = [&](const at::Tensor& t, const char* name, at::IntArrayRef shape) {
    TORCH_CHECK(t.device() == device, op, ": ", name, " must be on the operands' device ", device, ", got ", t.device(),
                ".");
    TORCH_CHECK(t.sizes() == shape, op, ": ", name, " must have shape ", shape, ", got ", t.sizes(), ".");
    return as_type(t, type).contiguous();
  };
  return CorrectionTensors{ready(*shift, "shift", per_example), ready(*patch_mean, "patch_mean", mean_shape),
                           ready(*scale, "scale", per_example), ready(*correlation, "correlation", weight_shape)};
}

std::optional<CorrectionTensors> read_correction(const OptionalTensor& shift, const OptionalTensor& patch_mean,
                                                 const OptionalTensor& scale, const OptionalTensor& correlation,
                                                 at::ScalarType type, at::Device device, const ConvShape& shape,
                                                 at::IntArrayRef kernel_size, const char* op) {
  std::vector<int64_t> mean_shape{shape.channels}, weight_shape{shape.out_channels, shape.group_channels()};
  for (std::vector<int64_t>* sizes : {&mean_shape, &weight_shape})
    sizes->insert(sizes->end(), kernel_size.begin(), kernel_size.end());
  return read_correction(shift, patch_mean, scale, correlation, type, device, {shape.n, shape.out_channels}, mean_shape,
                         weight_shape, op);
}

ConvShape patch_shape(const at::Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation, const char* op) {
  const int64_t dims = x.dim() - 2;
  TORCH_CHECK(dims >= 1 && dims <= 3, op, ": expected x [n, C, *S] with 1 to 3 spatial dimensions, got x ", x.sizes(), ".");
  for (const auto& [values, name, least] : {std::tuple{kernel_size, "kernel_size", 1}, std::tuple{stride, "stride", 1},
                                            std::tuple{padding, "padding", 0}, std::tuple{dilation, "dilation", 1}}) {
    TORCH_CHECK(static_cast<int64_t>(values.size()) == dims, op, ": ", name, " needs one value for each of the ",
                dims, " spatial dimensions of x, got ", values, ".");
    for (int64_t value : values)
      TORCH_CHECK(value >= least, op, ": ", name, " must be at least ", least, ", got ", values, ".");
  }
  ConvShape s;
  s.n = x.size(0), s.channels = x.size(1), s.out_channels = 1;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t at = 3 - dims + i;
    s.in[at] = x.size(i + 2);
    s.kernel[at] = kernel_size[i], s.stride[at] = stride[i], s.padding[at] = padding[i], s.dilation[at] = dilation[i];
    const int64_t span = s.in[at] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1;
    s.out[at] = span < 0 ? 0 : span / stride[i] + 1;
  }
  return s;
}

ConvShape conv_shape(const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                     at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, const char* op) {
  const int64_t dims = x.dim() - 2;
  TORCH_CHECK(dims >= 1 && dims <= 3 && gy.dim() == x.dim() && x.size(0) == gy.size(0), op,
              ": expected x [n, C, *S] and gy [n, d, *So] with the same n and 1 to 3 spatial dimensions, "
              "got x ", x.sizes(), " and gy ", gy.sizes(), ".");
  ConvShape s = patch_shape(x, kernel_size, stride, padding, dilation, op);
  s.out_channels = gy.size(1), s.groups = groups;
  TORCH_CHECK(groups >= 1 && s.channels % groups == 0 && s.out_channels % groups == 0, op,
              ": groups must divide both the ", s.channels, " channels of x and the ", s.out_channels,
              " of gy, got groups = ", groups, ".");
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t expected = s.out[3 - dims + i];
    TORCH_CHECK(gy.size(i + 2) == expected, op, ": a convolution of x ", x.sizes(), " with kernel_size ",
                kernel_size, ", stride ", stride, ", padding ", padding, " and dilation ", dilation,
                " has output size ", expected, " in spatial dimension ", i, ", got ", gy.size(i + 2), " from gy ",
                gy.sizes(), ". Pass the layer's own settings; pad x yourself for padding modes other than zeros.");
  }
  return s;
}

ConvShape linear_shape(const at::Tensor& a, const at::Tensor& b, const char* op) {
  TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(1) == b.size(1), op,
              ": expected activations a [n, T, p] and backprops b [n, T, d] with the same n and T, got a ", a.sizes(),
              " and b ", b.sizes(), ". Flatten the positions of each example into one T.");
  ConvShape s;
  s.n = a.size(0), s.channels = a.size(2), s.out_channels = b.size(2);
  s.in = s.out = {1, 1, a.size(1)};
  return s;
}

OptionalTensor check_clip(const at::Tensor& squared_norms, double alpha, const OptionalTensor& factors) {
  TORCH_CHECK(squared_norms.dim() == 2, "clip_weights: expected squared_norms [layers, n], got ", squared_norms.sizes(),
              ". Stack the layers' [n] vectors.");
  TORCH_CHECK(squared_norms.is_floating_point(), "clip_weights: squared_norms must be floating point, got ",
              squared_norms.scalar_type(), ".");
  TORCH_CHECK(alpha > 0, "clip_weights: alpha must be positive (inf for no clipping), got ", alpha, ".");
  if (!factors) return std::nullopt;
  TORCH_CHECK(factors->dim() == 1 && factors->size(0) == squared_norms.size(0),
              "clip_weights: expected one factor for each of the ", squared_norms.size(0), " layers, got factors ",
              factors->sizes(), ".");
  return factors->to(squared_norms.device(), at::kDouble).contiguous();
}

bool channels_last(const at::Tensor& x) { return x.size(1) > 1 && x.stride(1) == 1 && x.stride(-1) != 1; }

Form parse_form(std::string_view form) {
  if (form == "direct") return Form::kDirect;
  if (form == "gram") return Form::kGram;
  TORCH_CHECK(form == "auto", "form must be \"auto\", \"direct\" or \"gram\", got \"", std::string(form), "\".");
  return Form::kAuto;
}

at::ScalarType compute_type(const at::Tensor& a, const at::Tensor& b, const char* op) {
  TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.device() == b.device(), op,
              ": both operands must have one dtype and device, got ", a.scalar_type(), " on ", a.device(), " and ",
              b.scalar_type(), " on ", b.device(), ".");
  const at::ScalarType type = a.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op,
              ": expected float32, float64, float16 or bfloat16, got ", type, ".");
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace engm
