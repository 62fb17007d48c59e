// What is composed of ATen's operators, for every device.
//
// position_sums:  sums[i] = Σ_t g[i, t, :] or Σ_t g[i, :, t], and norm_sq[i] = ‖sums[i]‖²     g [n, T, d] or [n, d, T]
//
// scaled_accumulate:  out[o, c] = Σ_i w_i Σ_t b[i, t, o] a[i, t, c]        a [n, T, p], b [n, T, d], w [n]
//
// The sum is one matrix product over K = n·T. The weights are multiplied into the smaller factor before, whose copy
// costs n·T·min(p, d) elements. Without a the result is Σ_i w_i Σ_t b[i, t], the gradient of a bias.
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "ops.h"

namespace engm {

std::tuple<at::Tensor, at::Tensor> position_sums(const at::Tensor& gradients, int64_t dim) {
  TORCH_CHECK(gradients.dim() == 3 && (dim == 1 || dim == 2),
              "position_sums: expected gradients [n, ., .] and dim 1 or 2, got gradients ", gradients.sizes(),
              " and dim ", dim, ".");
  const at::ScalarType type = compute_type(gradients, gradients, "position_sums");
  const at::Tensor sums = gradients.size(dim) == 1 ? as_type(gradients.select(dim, 0), type)
                                                   : at::sum(gradients, at::IntArrayRef{dim}, false, type);
  return {at::sum(at::mul(sums, sums), at::IntArrayRef{1}), sums};
}

std::tuple<at::Tensor, at::Tensor> position_sums_apart(const at::Tensor& gradients, int64_t dim) {
  const auto [norm_sq, sums] = position_sums(gradients, dim);
  return {norm_sq, sums.is_alias_of(gradients) ? sums.clone() : sums};
}

at::Tensor scaled_accumulate(const OptionalTensor& a_in, const at::Tensor& b_in, const at::Tensor& weights) {
  TORCH_CHECK(b_in.dim() == 3, "scaled_accumulate: expected backprops b [n, T, d], got ", b_in.sizes(), ".");
  TORCH_CHECK(weights.dim() == 1 && weights.size(0) == b_in.size(0),
              "scaled_accumulate: expected one weight for each of the ", b_in.size(0), " examples of b ", b_in.sizes(),
              ", got weights ", weights.sizes(), ".");
  TORCH_CHECK(!a_in || (a_in->dim() == 3 && a_in->size(0) == b_in.size(0) && a_in->size(1) == b_in.size(1)),
              "scaled_accumulate: expected activations a [n, T, p] with the n and T of b ", b_in.sizes(), ", got a ",
              a_in ? a_in->sizes() : at::IntArrayRef{}, ".");
  const at::ScalarType type = compute_type(a_in ? *a_in : b_in, b_in, "scaled_accumulate");
  const at::Tensor b = as_type(b_in, type), w = as_type(weights, type);
  const int64_t positions = b.size(0) * b.size(1), d = b.size(2);
  if (!a_in) {
    if (positions == 0) return at::zeros({d}, b.options());
    return at::mv(b.reshape({positions, d}).t(), w.unsqueeze(1).expand({b.size(0), b.size(1)}).reshape({positions}));
  }
  const at::Tensor a = a_in->to(type), each = w.view({-1, 1, 1});
  const int64_t p = a.size(2);
  if (positions == 0) return at::zeros({d, p}, b.options());
  const bool scale_b = d <= p;
  const at::Tensor left = (scale_b ? at::mul(b, each) : b).reshape({positions, d});
  const at::Tensor right = (scale_b ? a : at::mul(a, each)).reshape({positions, p});
  return at::mm(left.t(), right);
}

}  // namespace engm
