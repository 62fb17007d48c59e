// The operators that csrc/ops.cpp registers. Shapes in the schemas' order; [n] is the batch.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "cost_model.h"

namespace engm {

using OptionalTensor = std::optional<at::Tensor>;

Form parse_form(std::string_view form, bool corrected);

// The type that sums are formed in: float64 stays, half types become float32; anything else is an error.
at::ScalarType compute_type(const at::Tensor& a, const at::Tensor& b, const char* op);

namespace cpu {

at::Tensor linear_norm_sq(const at::Tensor& a, const at::Tensor& b, std::string_view form, const OptionalTensor& shift,
                          const OptionalTensor& patch_mean, const OptionalTensor& scale,
                          const OptionalTensor& correlation);

at::Tensor conv_norm_sq(const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, std::string_view form,
                        const OptionalTensor& shift, const OptionalTensor& patch_mean, const OptionalTensor& scale,
                        const OptionalTensor& correlation);

// norm_sq [n] and grads [n, d, p] or [n, d, C / groups, *kernel_size].
std::tuple<at::Tensor, at::Tensor> linear_grads(const at::Tensor& a, const at::Tensor& b);
std::tuple<at::Tensor, at::Tensor> conv_grads(const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef kernel_size,
                                              at::IntArrayRef stride, at::IntArrayRef padding,
                                              at::IntArrayRef dilation, int64_t groups);

std::tuple<at::Tensor, at::Tensor, at::Tensor> affine_norm_sq(const at::Tensor& x, const at::Tensor& gy,
                                                              const OptionalTensor& mean, const at::Tensor& rstd,
                                                              int64_t channel_dim);

std::tuple<at::Tensor, at::Tensor> clip_weights(const at::Tensor& squared_norms, double alpha,
                                                const OptionalTensor& factors);

}  // namespace cpu

#ifdef ENGM_WITH_CUDA
namespace cuda {
std::tuple<at::Tensor, at::Tensor> clip_weights(const at::Tensor& squared_norms, double alpha,
                                                const OptionalTensor& factors);
}  // namespace cuda
#endif

// One composition for every device.
at::Tensor scaled_accumulate(const OptionalTensor& a, const at::Tensor& b, const at::Tensor& weights);

// Checks shared by the devices; returns the factors in float64 on the norms' device, or nothing.
OptionalTensor check_clip(const at::Tensor& squared_norms, double alpha, const OptionalTensor& factors);

}  // namespace engm
