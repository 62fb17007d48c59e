// What every device checks before it computes; errors name the operator and say what to do.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "conv_shape.h"
#include "cost_model.h"

namespace engm {

using OptionalTensor = std::optional<at::Tensor>;

Form parse_form(std::string_view form, bool corrected);

// The type that sums are formed in: float64 stays, half types become float32; anything else is an error.
at::ScalarType compute_type(const at::Tensor& a, const at::Tensor& b, const char* op);

// The factors in float64 on the norms' device, or nothing.
OptionalTensor check_clip(const at::Tensor& squared_norms, double alpha, const OptionalTensor& factors);

// Local batch-norm correction, see LocalCorrection in engm/terms.py.
struct CorrectionTensors {
  at::Tensor shift, patch_mean, scale, correlation;
};

// All four or none, on `device`; brought to `type` and made contiguous.
std::optional<CorrectionTensors> read_correction(const OptionalTensor& shift, const OptionalTensor& patch_mean,
                                                 const OptionalTensor& scale, const OptionalTensor& correlation,
                                                 at::ScalarType type, at::Device device, at::IntArrayRef per_example,
                                                 at::IntArrayRef mean_shape, at::IntArrayRef weight_shape,
                                                 const char* op);

// The shape of a convolution, checked against its operands.
ConvShape conv_shape(const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                     at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, const char* op);

// One tap over T positions.
ConvShape linear_shape(const at::Tensor& a, const at::Tensor& b, const char* op);

}  // namespace engm
