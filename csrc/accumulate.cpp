// scaled_accumulate: Σ_i w_i b_iᵀ a_i as one GEMM over K = n·T, with the weights put into the smaller factor first.
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/zeros.h>

#include "ops.h"

namespace engm {

at::Tensor scaled_accumulate(const OptionalTensor& a_in, const at::Tensor& b_in, const at::Tensor& weights) {
  TORCH_CHECK(b_in.dim() == 3, "scaled_accumulate: expected backprops b [n, T, d], got ", b_in.sizes(), ".");
  TORCH_CHECK(weights.dim() == 1 && weights.size(0) == b_in.size(0),
              "scaled_accumulate: expected one weight for each of the ", b_in.size(0), " examples of b ", b_in.sizes(),
              ", got weights ", weights.sizes(), ".");
  TORCH_CHECK(!a_in || (a_in->dim() == 3 && a_in->size(0) == b_in.size(0) && a_in->size(1) == b_in.size(1)),
              "scaled_accumulate: expected activations a [n, T, p] with the n and T of b ", b_in.sizes(), ", got a ",
              a_in ? a_in->sizes() : at::IntArrayRef{}, ".");
  const at::ScalarType type = compute_type(a_in ? *a_in : b_in, b_in, "scaled_accumulate");
  const at::Tensor b = b_in.to(type), w = weights.to(type);
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

Form parse_form(std::string_view form, bool corrected) {
  if (form == "direct") return Form::kDirect;
  if (form == "gram") {
    TORCH_CHECK(!corrected, "form=\"gram\" has no batch-norm correction. Use form=\"auto\" or \"direct\" with one.");
    return Form::kGram;
  }
  TORCH_CHECK(form == "auto", "form must be \"auto\", \"direct\" or \"gram\", got \"", std::string(form), "\".");
  return corrected ? Form::kDirect : Form::kAuto;
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
