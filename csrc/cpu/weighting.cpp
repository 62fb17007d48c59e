// out_k[i, e] = w_i in_k[i, e]   and   out_k[e] = Σ_i w_i in_k[i, e],   for a list of tensors in_k [n, ...] and w [n]
//
// On the CPU both go through one tensor at a time, read every element once, and are composed of ATen's operators but for
// few elements. CUDA takes all tensors in one launch.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "../elementwise_checks.h"
#include "../ops.h"

namespace engm::cpu {

namespace {

constexpr int64_t kFew = 1 << 14;  // elements for which an operator of ATen's takes longer to begin than to compute

// Calls `body` with a number of the tensors' type where loops of our own are quicker: few elements, one after another.
template <class Body>
bool in_loops(const at::Tensor& t, const at::Tensor& weights, const Body& body) {
  const bool few = t.numel() > 0 && t.numel() <= kFew && t.is_contiguous() && weights.is_contiguous() &&
                   t.scalar_type() == weights.scalar_type();
  if (few && t.scalar_type() == at::kFloat) return body(float()), true;
  if (few && t.scalar_type() == at::kDouble) return body(double()), true;
  return false;
}

}  // namespace

std::vector<at::Tensor> scale_examples(at::TensorList tensors, const at::Tensor& weights) {
  check_examples(tensors, weights, "scale_examples");
  std::vector<at::Tensor> scaled;
  scaled.reserve(tensors.size());
  for (const at::Tensor& given : tensors) {
    const at::Tensor t = is_dense_by_example(given) ? given : given.contiguous();
    at::Tensor out = at::empty_like(t);
    const bool done = in_loops(t, weights, [&](auto number) {
      using Number = decltype(number);
      const int64_t n = t.size(0), size = t.numel() / n;
      const Number *const w = weights.const_data_ptr<Number>(), *from = t.const_data_ptr<Number>();
      Number* to = out.mutable_data_ptr<Number>();
      for (int64_t i = 0; i < n; ++i, from += size, to += size)
        for (int64_t e = 0; e < size; ++e) to[e] = w[i] * from[e];
    });
    if (!done) {
      std::vector<int64_t> shape(t.dim(), 1);
      shape[0] = t.size(0);
      at::mul_out(out, t, weights.to(compute_type(t, t, "scale_examples")).view(shape));  // half types rounded once
    }
    scaled.push_back(out);
  }
  return scaled;
}

std::vector<at::Tensor> weighted_sums(at::TensorList tensors, const at::Tensor& weights) {
  check_examples(tensors, weights, "weighted_sums");
  std::vector<at::Tensor> sums;
  sums.reserve(tensors.size());
  for (const at::Tensor& t : tensors) {
    const at::ScalarType type = compute_type(t, t, "weighted_sums");
    const at::IntArrayRef shape = t.sizes().slice(1);
    const int64_t n = t.size(0);
    if (t.numel() == 0) {
      sums.push_back(at::zeros(shape, t.options().dtype(type)));
      continue;
    }
    at::Tensor out;
    const bool done = in_loops(t, weights, [&](auto number) {
      using Number = decltype(number);
      out = at::empty(shape, t.options());
      const int64_t size = out.numel();
      const Number *const w = weights.const_data_ptr<Number>(), *from = t.const_data_ptr<Number>();
      Number* const to = out.mutable_data_ptr<Number>();
      for (int64_t e = 0; e < size; ++e) to[e] = w[0] * from[e];
      for (int64_t i = 1; i < n; ++i)
        for (int64_t e = 0; e < size; ++e) to[e] += w[i] * from[i * size + e];
    });
    if (!done) out = at::matmul(weights.to(type).view({1, n}), t.to(type).reshape({n, -1})).view(shape);
    sums.push_back(out);
  }
  return sums;
}

at::Tensor weighted_gemm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& weights) {
  return scaled_accumulate(a, b, weights);
}

}  // namespace engm::cpu
