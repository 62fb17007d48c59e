// Binds weighted_gemm on CUDA: checks operands, settles their layout, allocates workspace and output.
#include "weighted_gemm.h"

#include <ATen/ops/empty.h>

#include "../ops.h"
#include "../precision.h"
#include "element_type.h"
#include "stream.h"

namespace engm::cuda {
namespace {

// A tensor [n, T, width] whose rows are one pitch apart; it is copied if they are not.
struct Rows {
  at::Tensor t;
  int64_t pitch;
  bool aligned;

  explicit Rows(const at::Tensor& given) : t(given) {
    // The stride of a dimension of size 1 says nothing.
    const bool regular = t.size(0) == 1 || t.size(1) == 1 || t.stride(0) == t.stride(1) * t.size(1);
    if (t.stride(2) != 1 || !regular) t = t.contiguous();
    pitch = t.size(1) == 1 ? t.stride(0) : t.stride(1);
    const int64_t bytes = t.element_size();
    aligned = is_aligned_16(t.const_data_ptr()) && pitch * bytes % 16 == 0 && t.size(2) * bytes % 16 == 0;
  }
};

}  // namespace

at::Tensor weighted_gemm(const at::Tensor& a_in, const at::Tensor& b_in, const at::Tensor& weights_in) {
  TORCH_CHECK(a_in.dim() == 3 && b_in.dim() == 3 && a_in.size(0) == b_in.size(0) && a_in.size(1) == b_in.size(1),
              "weighted_gemm: expected activations a [n, T, p] and backprops b [n, T, d] with the same n and T, got a ",
              a_in.sizes(), " and b ", b_in.sizes(), ".");
  const int64_t n = b_in.size(0), positions = b_in.size(1), d = b_in.size(2), p = a_in.size(2);
  TORCH_CHECK(weights_in.dim() == 1 && weights_in.size(0) == n && weights_in.device() == b_in.device(),
              "weighted_gemm: expected one weight for each of the ", n, " examples, on the device of b, got weights ",
              weights_in.sizes(), " on ", weights_in.device(), ".");
  TORCH_CHECK(n * positions < INT32_MAX && p < INT32_MAX && d < INT32_MAX,
              "weighted_gemm: expected fewer than 2^31 rows and columns, got a ", a_in.sizes(), " and b ", b_in.sizes(),
              ". Use scaled_accumulate.");
  const at::ScalarType type = compute_type(a_in, b_in, "weighted_gemm");
  const OnDevice on(b_in);
  const Precision precision = precision_of(a_in.scalar_type(), false);
  if (!on.trusts(Kernel::kWeightedGemm, precision)) return aten::weighted_gemm(a_in, b_in, weights_in);
  const auto options = b_in.options().dtype(type).memory_format(std::nullopt);
  at::Tensor out = at::empty({d, p}, options);
  if (b_in.numel() == 0 || a_in.numel() == 0) return out.zero_();
  const Rows a(a_in), b(b_in);
  const at::Tensor weights = weights_in.to(type).contiguous();
  const int32_t splits = weighted_gemm_splits(n * positions, p, d, precision);
  const at::Tensor parts = splits > 1 ? at::empty({splits, d, p}, options) : at::Tensor();
  const WeightedGemm problem{a.t.const_data_ptr(),
                             b.t.const_data_ptr(),
                             weights.const_data_ptr(),
                             parts.defined() ? parts.mutable_data_ptr() : nullptr,
                             out.mutable_data_ptr(),
                             a.pitch,
                             b.pitch,
                             static_cast<int32_t>(n * positions),
                             static_cast<int32_t>(positions),
                             static_cast<int32_t>(p),
                             static_cast<int32_t>(d),
                             splits,
                             a.aligned,
                             b.aligned};
  check_launch(launch_weighted_gemm(problem, precision, on.stream()), "weighted_gemm");
  return out;
}

}  // namespace engm::cuda
