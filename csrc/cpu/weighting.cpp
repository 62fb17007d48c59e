// out_k[i, e] = w_i in_k[i, e]   and   out_k[e] = Σ_i w_i in_k[i, e],   for a list of tensors in_k [n, ...] and w [n]
//
// On the CPU both are composed of ATen's operators, one tensor at a time, and read every element once. CUDA takes all
// tensors in one launch.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "../elementwise_checks.h"
#include "../ops.h"

namespace engm::cpu {

std::vector<at::Tensor> scale_examples(at::TensorList tensors, const at::Tensor& weights) {
  check_examples(tensors, weights, "scale_examples");
  std::vector<at::Tensor> scaled;
  scaled.reserve(tensors.size());
  for (const at::Tensor& given : tensors) {
    const at::Tensor t = is_dense_by_example(given) ? given : given.contiguous();
    std::vector<int64_t> shape(t.dim(), 1);
    shape[0] = t.size(0);
    at::Tensor out = at::empty_like(t);
    at::mul_out(out, t, weights.to(compute_type(t, t, "scale_examples")).view(shape));  // half types rounded once
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
    if (t.numel() == 0) {
      sums.push_back(at::zeros(shape, t.options().dtype(type)));
      continue;
    }
    const int64_t n = t.size(0);
    sums.push_back(at::matmul(weights.to(type).view({1, n}), t.to(type).reshape({n, -1})).view(shape));
  }
  return sums;
}

at::Tensor weighted_gemm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& weights) {
  return scaled_accumulate(a, b, weights);
}

}  // namespace engm::cpu
