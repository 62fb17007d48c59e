// Declares the checks that every device makes before it computes. An error names the operator, says what was expected
// and what came, and what to do.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <string_view>

#include "conv_shape.h"
#include "cost_model.h"

namespace engm {

using OptionalTensor = std::optional<at::Tensor>;

// The tensor in that type. To ask the dispatcher for a cast to the type that is there takes as long as a small operator.
inline at::Tensor as_type(const at::Tensor& t, at::ScalarType type) { return t.scalar_type() == type ? t : t.to(type); }

// Whether the channels of a map [n, C, *S] lie side by side in memory and its pixels do not, which a form may pay for.
bool channels_last(const at::Tensor& x);

// The form that the user named.
Form parse_form(std::string_view form);

// The type that sums are formed in: float64 stays, half types become float32, and anything else is an error, as are
// operands of two types or devices.
at::ScalarType compute_type(const at::Tensor& a, const at::Tensor& b, const char* op);

// Checks squared_norms [layers, n], and returns the factors [layers] in float64 on their device, or nothing.
OptionalTensor check_clip(const at::Tensor& squared_norms, double alpha, const OptionalTensor& factors);

// Keeps autocast from giving ATen's operators other types than they are called with.
struct AsWritten {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// What a batch norm in training mode takes off the gradient of the layer before it:
// shift[i, o]·patch_mean[c, tap] + scale[i, o]·correlation[o, c, tap].
struct CorrectionTensors {
  at::Tensor shift, patch_mean, scale, correlation;
};

// Takes all four tensors or none, which must be on `device`, and returns them contiguous and of `type`.
std::optional<CorrectionTensors> read_correction(const OptionalTensor& shift, const OptionalTensor& patch_mean,
                                                 const OptionalTensor& scale, const OptionalTensor& correlation,
                                                 at::ScalarType type, at::Device device, at::IntArrayRef per_example,
                                                 at::IntArrayRef mean_shape, at::IntArrayRef weight_shape,
                                                 const char* op);

// The same for a convolution of that shape.
std::optional<CorrectionTensors> read_correction(const OptionalTensor& shift, const OptionalTensor& patch_mean,
                                                 const OptionalTensor& scale, const OptionalTensor& correlation,
                                                 at::ScalarType type, at::Device device, const ConvShape& shape,
                                                 at::IntArrayRef kernel_size, const char* op);

// The shape of a convolution, after checks of the operands x [n, C, *S] and gy [n, d, *So] against it.
ConvShape conv_shape(const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                     at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, const char* op);

// The shape of a convolution whose output has one channel, from its input x [n, C, *S] alone.
ConvShape patch_shape(const at::Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation, const char* op);

// The shape of a linear layer with a [n, T, p] and b [n, T, d]: a convolution of one tap over a line of T pixels.
ConvShape linear_shape(const at::Tensor& a, const at::Tensor& b, const char* op);

}  // namespace engm
