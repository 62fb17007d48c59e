// Declares the functions behind the operators that schemas.h registers; engm/ops.py documents their arguments, and
// csrc/README.md has the formulas. n is the number of examples.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "checks.h"

namespace engm {

namespace cpu {

at::Tensor linear_norm_sq(const at::Tensor& a, const at::Tensor& b, std::string_view form, const OptionalTensor& shift,
                          const OptionalTensor& patch_mean, const OptionalTensor& scale,
                          const OptionalTensor& correlation);

at::Tensor conv_norm_sq(const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, std::string_view form,
                        const OptionalTensor& shift, const OptionalTensor& patch_mean, const OptionalTensor& scale,
                        const OptionalTensor& correlation);

// Both return norm_sq [n], and grads [n, d, p] or [n, d, C / groups, *kernel_size].
std::tuple<at::Tensor, at::Tensor> linear_grads(const at::Tensor& a, const at::Tensor& b);
std::tuple<at::Tensor, at::Tensor> conv_grads(const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef kernel_size,
                                              at::IntArrayRef stride, at::IntArrayRef padding,
                                              at::IntArrayRef dilation, int64_t groups);

std::tuple<at::Tensor, at::Tensor, at::Tensor> affine_norm_sq(const at::Tensor& x, const at::Tensor& gy,
                                                              const OptionalTensor& mean, const at::Tensor& rstd,
                                                              int64_t channel_dim);

std::tuple<at::Tensor, at::Tensor> clip_weights(const at::Tensor& squared_norms, double alpha,
                                                const OptionalTensor& factors);

// indices [n, T], gy [n, T, d] -> [n]; positions whose index is padding_idx are left out.
at::Tensor embedding_norm_sq(const at::Tensor& indices, const at::Tensor& gy, int64_t padding_idx);

// Every tensor is [n, ...] and the weights are [n]. The first multiplies each example by its weight, the second returns
// the weighted sums over the examples.
std::vector<at::Tensor> scale_examples(at::TensorList tensors, const at::Tensor& weights);
std::vector<at::Tensor> weighted_sums(at::TensorList tensors, const at::Tensor& weights);

// a [n, T, p], b [n, T, d] -> [d, p]
at::Tensor weighted_gemm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& weights);

}  // namespace cpu

#if defined(ENGM_WITH_CUDA) || defined(ENGM_EMULATOR)
// The functions for CUDA tensors have the arguments and results of those for the CPU.
namespace cuda {

at::Tensor linear_norm_sq(const at::Tensor& a, const at::Tensor& b, std::string_view form, const OptionalTensor& shift,
                          const OptionalTensor& patch_mean, const OptionalTensor& scale,
                          const OptionalTensor& correlation);

at::Tensor conv_norm_sq(const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, std::string_view form,
                        const OptionalTensor& shift, const OptionalTensor& patch_mean, const OptionalTensor& scale,
                        const OptionalTensor& correlation);

// Both return norm_sq [n], and grads [n, d, p] or [n, d, C / groups, *kernel_size].
std::tuple<at::Tensor, at::Tensor> linear_grads(const at::Tensor& a, const at::Tensor& b);
std::tuple<at::Tensor, at::Tensor> conv_grads(const at::Tensor& x, const at::Tensor& gy, at::IntArrayRef kernel_size,
                                              at::IntArrayRef stride, at::IntArrayRef padding,
                                              at::IntArrayRef dilation, int64_t groups);

std::tuple<at::Tensor, at::Tensor, at::Tensor> affine_norm_sq(const at::Tensor& x, const at::Tensor& gy,
                                                              const OptionalTensor& mean, const at::Tensor& rstd,
                                                              int64_t channel_dim);

std::tuple<at::Tensor, at::Tensor> clip_weights(const at::Tensor& squared_norms, double alpha,
                                                const OptionalTensor& factors);

// indices [n, T], gy [n, T, d] -> [n]; positions whose index is padding_idx are left out.
at::Tensor embedding_norm_sq(const at::Tensor& indices, const at::Tensor& gy, int64_t padding_idx);

// Every tensor is [n, ...] and the weights are [n]. The first multiplies each example by its weight, the second returns
// the weighted sums over the examples.
std::vector<at::Tensor> scale_examples(at::TensorList tensors, const at::Tensor& weights);
std::vector<at::Tensor> weighted_sums(at::TensorList tensors, const at::Tensor& weights);

// a [n, T, p], b [n, T, d] -> [d, p]
at::Tensor weighted_gemm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& weights);

}  // namespace cuda
#endif

// Serves every device, as the one below does: the sums over a dimension of [n, ., .] and their squared norms [n].
std::tuple<at::Tensor, at::Tensor> position_sums(const at::Tensor& gradients, int64_t dim);

// Serves every device: it is composed of ATen's operators. a [n, T, p] or nothing, b [n, T, d], weights [n] -> [d, p],
// or [d] without a.
at::Tensor scaled_accumulate(const OptionalTensor& a, const at::Tensor& b, const at::Tensor& weights);

}  // namespace engm
