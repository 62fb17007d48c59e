// Binds scale_examples and weighted_sums on CUDA: checks tensors, allocates outputs, and cuts lists to what one launch
// takes.
#include "weighting.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "../elementwise_checks.h"
#include "../ops.h"
#include "../precision.h"
#include "element_type.h"
#include "stream.h"

namespace engm::cuda {
namespace {

// Describes a tensor `in` [n, ...], dense example after example, and its result. Empty tensors own no block.
WeightedTensor entry(const at::Tensor& in, at::Tensor& out) {
  const int64_t per_example = in.size(0) == 0 ? out.numel() : in.numel() / in.size(0);
  const void* from = in.const_data_ptr();
  void* to = out.mutable_data_ptr();
  const bool aligned = is_aligned_16(from) && is_aligned_16(to) && per_example * in.element_size() % 16 == 0;
  return {from, to, per_example, element_of(in), aligned};
}

// Launches a kernel over the pairs (in, out), as many at once as fit.
void launch_in_groups(const std::vector<at::Tensor>& in, std::vector<at::Tensor>& out, const at::Tensor& weights,
                      int (*launcher)(WeightedTensors&, void*), const OnDevice& on, const char* op) {
  WeightedTensors all{};
  all.weights = weights.const_data_ptr();
  all.weights_are_double = weights.scalar_type() == at::kDouble;
  all.n = weights.size(0);
  for (size_t begin = 0; begin < in.size(); begin += kTensorsAtOnce) {
    const size_t end = std::min(in.size(), begin + kTensorsAtOnce);
    for (size_t k = begin; k < end; ++k) all.tensor[k - begin] = entry(in[k], out[k]);
    all.count = int32_t(end - begin);
    check_launch(launcher(all, on.stream()), op);
  }
}

// Whether the kernels may be used in the types of all tensors. A neighbour's type is not asked for again: that costs a
// call of CUDA.
bool trusts_all(const OnDevice& on, at::TensorList tensors) {
  bool all = true;
  for (size_t k = 0; k < tensors.size(); ++k)
    if (k == 0 || tensors[k].scalar_type() != tensors[k - 1].scalar_type())
      all = all && on.trusts(Kernel::kWeighting, precision_of(tensors[k].scalar_type()));
  return all;
}

}  // namespace

std::vector<at::Tensor> scale_examples(at::TensorList tensors, const at::Tensor& weights_in) {
  const bool has_double = check_examples(tensors, weights_in, "scale_examples");
  const OnDevice on(weights_in);
  if (!trusts_all(on, tensors)) return aten::scale_examples(tensors, weights_in);
  const at::Tensor weights = weights_in.to(has_double ? at::kDouble : at::kFloat).contiguous();
  std::vector<at::Tensor> in, out;
  for (const at::Tensor& t : tensors) {
    in.push_back(is_dense_by_example(t) ? t : t.contiguous());
    out.push_back(at::empty_like(in.back()));
  }
  launch_in_groups(in, out, weights, launch_scale_examples, on, "scale_examples");
  return out;
}

std::vector<at::Tensor> weighted_sums(at::TensorList tensors, const at::Tensor& weights_in) {
  const bool has_double = check_examples(tensors, weights_in, "weighted_sums");
  const OnDevice on(weights_in);
  if (!trusts_all(on, tensors)) return aten::weighted_sums(tensors, weights_in);
  const at::Tensor weights = weights_in.to(has_double ? at::kDouble : at::kFloat).contiguous();
  std::vector<at::Tensor> in, out;
  for (const at::Tensor& t : tensors) {
    in.push_back(t.contiguous());
    const at::ScalarType type = compute_type(t, t, "weighted_sums");
    out.push_back(at::empty(t.sizes().slice(1), t.options().dtype(type).memory_format(std::nullopt)));
  }
  launch_in_groups(in, out, weights, launch_weighted_sums, on, "weighted_sums");
  return out;
}

}  // namespace engm::cuda
