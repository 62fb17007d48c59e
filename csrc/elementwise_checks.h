// Checks operands of the operators that weight examples or sum over positions, for every device.
#pragma once

#include <ATen/core/Tensor.h>

#include "checks.h"

namespace engm {

// Checks indices [n, T] and gy [n, T, d], and returns the type that the norms are formed in.
inline at::ScalarType check_embedding(const at::Tensor& indices, const at::Tensor& gy) {
  TORCH_CHECK(indices.dim() == 2 && gy.dim() == 3 && indices.size(0) == gy.size(0) && indices.size(1) == gy.size(1),
              "embedding_norm_sq: expected indices [n, T] and backprops gy [n, T, d] with the same n and T, got "
              "indices ", indices.sizes(), " and gy ", gy.sizes(), ". Flatten each example's positions into one T.");
  TORCH_CHECK(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt,
              "embedding_norm_sq: indices must be int64 or int32, got ", indices.scalar_type(), ".");
  TORCH_CHECK(indices.device() == gy.device(), "embedding_norm_sq: indices and gy must be on one device, got ",
              indices.device(), " and ", gy.device(), ".");
  return compute_type(gy, gy, "embedding_norm_sq");
}

// Whether a tensor [n, d, T] is dense with T or d along memory.
inline bool is_dense_by_position(const at::Tensor& t) { return t.is_contiguous() || t.transpose(1, 2).is_contiguous(); }

// Checks outputs [n, d, T] of a layer before a batch norm, the latter's statistics [d] and gradients [n, d], and returns the
// type that sums are formed in.
inline at::ScalarType check_correction(const at::Tensor& outputs, const at::Tensor& mean, const at::Tensor& rstd,
                                       const at::Tensor& gain, const at::Tensor& shift, const at::Tensor& scale) {
  TORCH_CHECK(outputs.dim() == 3, "correction_factors: expected outputs [n, d, T], got ", outputs.sizes(),
              ". Flatten the positions into one T.");
  const int64_t n = outputs.size(0), d = outputs.size(1);
  for (const auto& [t, name] : {std::pair(&mean, "mean"), std::pair(&rstd, "rstd"), std::pair(&gain, "gain")})
    TORCH_CHECK(t->dim() == 1 && t->size(0) == d && t->device() == outputs.device(), "correction_factors: ", name,
                " must be [d] of the ", d, " channels of outputs, on their device, got ", t->sizes(), " on ", t->device(),
                ".");
  for (const auto& [t, name] : {std::pair(&shift, "shift"), std::pair(&scale, "scale")})
    TORCH_CHECK(t->dim() == 2 && t->size(0) == n && t->size(1) == d && t->device() == outputs.device(),
                "correction_factors: ", name, " must be [n, d] = [", n, ", ", d, "], on the device of outputs, got ",
                t->sizes(), " on ", t->device(), ".");
  return compute_type(outputs, outputs, "correction_factors");
}

// Checks tensors [n, ...] and weights [n], and returns whether any tensor is float64: the weights are then kept in it.
inline bool check_examples(at::TensorList tensors, const at::Tensor& weights, const char* op) {
  TORCH_CHECK(weights.dim() == 1 && weights.is_floating_point(), op,
              ": expected floating-point weights [n], one for each example, got ", weights.sizes(), " of ",
              weights.scalar_type(), ".");
  bool has_double = false;
  for (const at::Tensor& t : tensors) {
    TORCH_CHECK(t.dim() >= 1 && t.size(0) == weights.size(0), op,
                ": expected tensors [n, ...] with one row for each of the ", weights.size(0), " weights, got ",
                t.sizes(), ".");
    TORCH_CHECK(t.device() == weights.device(), op, ": tensors and weights must be on one device, got ", t.device(),
                " and ", weights.device(), ".");
    has_double |= compute_type(t, t, op) == at::kDouble;
  }
  return has_double;
}

// Whether a tensor's elements fill one stretch of memory, example after example. Within an example any order will do.
inline bool is_dense_by_example(const at::Tensor& t) {
  if (t.numel() == 0) return true;
  return t.is_non_overlapping_and_dense() && (t.size(0) == 1 || t.stride(0) == t.numel() / t.size(0));
}

}  // namespace engm
