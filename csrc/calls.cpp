// The operators as plain functions of the Python module: a call of torch.ops.engm looks its arguments up in the schema
// first, which takes three times as long as the dispatcher itself, and longer than a small layer's norm. What is called
// here goes through the dispatcher all the same, so that modes, fake tensors and profilers see it; torch.compile alone
// cannot look inside, and is given torch.ops.engm (engm/ops.py).
#include "calls.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ops.h"

namespace engm {

namespace {

namespace py = pybind11;

using Integers = std::vector<int64_t>;
using Tensors = std::vector<at::Tensor>;

// [n, *, p] as [n, T, p], T = 1 without dimensions between.
at::Tensor by_position(const at::Tensor& tensor) {
  const int64_t dims = tensor.dim();
  return dims == 3 ? tensor : dims == 2 ? tensor.unsqueeze(1) : tensor.unsqueeze(1).flatten(1, -2);
}

// Whether all numbers are finite. On the CPU they are looked at where they are: an operator and the reading of what it
// returns take longer than a small network's layer.
bool all_finite(const at::Tensor& tensor) {
  const bool plain = tensor.is_cpu() && tensor.has_storage() && tensor.is_contiguous() && !tensor.is_neg() &&
                     !tensor.key_set().has(c10::DispatchKey::Python) && c10::impl::TorchDispatchModeTLS::stack_len() == 0;
  const auto look = [&](auto number) {
    const auto* const from = tensor.const_data_ptr<decltype(number)>();
    return std::all_of(from, from + tensor.numel(), [](auto one) { return std::isfinite(one); });
  };
  if (plain && tensor.scalar_type() == at::kFloat) return look(float());
  if (plain && tensor.scalar_type() == at::kDouble) return look(double());
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return at::isfinite(tensor).all().item<bool>();
}

// The operator of that name; `function` is one of those that serve it, and gives the types.
template <class Function>
auto operator_of(const char* name, Function* function) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Function>();
}

// Sums over positions and their squared norms: by the CPU's operator where it has loops; elsewhere by ATen's operators,
// which a compiler of graphs may fuse.
std::tuple<at::Tensor, at::Tensor> summed(const at::Tensor& gradients, int64_t dim) {
  static const auto op = operator_of("engm::position_sums", cpu::position_sums);
  return is_summed_in_loops(gradients, dim) ? op.call(gradients, dim) : position_sums(gradients, dim);
}

// A call of a linear layer: activations [n, p] (none if the weight is not trained), backprops [n, d], and whether the
// bias is trained.
using RowCall = std::tuple<OptionalTensor, at::Tensor, bool>;
// Activations [n, 1, p] in the type of the backprops, backprops [n, 1, d], the squared norms of the weight's gradients,
// the bias's gradients and their squared norms; none of what is not asked for.
using RowTerms = std::tuple<OptionalTensor, at::Tensor, OptionalTensor, OptionalTensor, OptionalTensor>;

std::vector<RowTerms> row_terms(const std::vector<RowCall>& calls, bool norms) {
  static const auto norm_sq = operator_of("engm::linear_norm_sq", cpu::linear_norm_sq);
  std::vector<RowTerms> all;
  all.reserve(calls.size());
  for (const auto& [activations, backprops, bias] : calls) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto& [a, b, norm_of_weight, sums, norm_of_bias] = all.emplace_back();
    b = backprops.unsqueeze(1);
    if (activations) {
      a = as_type(*activations, backprops.scalar_type()).unsqueeze(1);
      if (norms) norm_of_weight = norm_sq.call(*a, b, "auto", std::nullopt, std::nullopt, std::nullopt, std::nullopt);
    }
    if (bias) {
      auto [found, gradients] = summed(b, 1);
      sums = std::move(gradients);
      norm_of_bias = std::move(found);
    }
  }
  return all;
}

// Binds an operator whose arguments Python's values turn into by themselves.
template <class Result, class... Arguments>
void bind(py::module_& m, const char* name, const char* full_name, Result (*function)(Arguments...)) {
  m.def(name, torch::wrap_pybind_function_no_gil([op = operator_of(full_name, function)](Arguments... arguments) {
          return op.call(arguments...);
        }));
}

}  // namespace

void bind_calls(py::module_& m) {
  bind(m, "linear_grads", "engm::linear_grads", cpu::linear_grads);
  bind(m, "affine_norm_sq", "engm::affine_norm_sq", cpu::affine_norm_sq);
  bind(m, "clip_weights", "engm::clip_weights", cpu::clip_weights);
  bind(m, "embedding_norm_sq", "engm::embedding_norm_sq", cpu::embedding_norm_sq);
  bind(m, "weighted_gemm", "engm::weighted_gemm", cpu::weighted_gemm);
  bind(m, "scaled_accumulate", "engm::scaled_accumulate", scaled_accumulate);
  m.def("position_sums", torch::wrap_pybind_function_no_gil(summed));
  bind(m, "correction_factors", "engm::correction_factors", cpu::correction_factors);
  bind(m, "linear_norm_sq", "engm::linear_norm_sq", cpu::linear_norm_sq);
  m.def("conv_norm_sq",
        torch::wrap_pybind_function_no_gil(
            [op = operator_of("engm::conv_norm_sq", cpu::conv_norm_sq)](
                const at::Tensor& x, const at::Tensor& gy, const Integers& kernel_size, const Integers& stride,
                const Integers& padding, const Integers& dilation, int64_t groups, std::string_view form,
                const OptionalTensor& shift, const OptionalTensor& patch_mean, const OptionalTensor& scale,
                const OptionalTensor& correlation) {
              return op.call(x, gy, kernel_size, stride, padding, dilation, groups, form, shift, patch_mean, scale,
                             correlation);
            }));
  m.def("conv_grads",
        torch::wrap_pybind_function_no_gil(
            [op = operator_of("engm::conv_grads", cpu::conv_grads)](
                const at::Tensor& x, const at::Tensor& gy, const Integers& kernel_size, const Integers& stride,
                const Integers& padding, const Integers& dilation,
                int64_t groups) { return op.call(x, gy, kernel_size, stride, padding, dilation, groups); }));
  m.def("patch_mean",
        torch::wrap_pybind_function_no_gil(
            [op = operator_of("engm::patch_mean", cpu::patch_mean)](
                const at::Tensor& x, const Integers& kernel_size, const Integers& stride, const Integers& padding,
                const Integers& dilation) { return op.call(x, kernel_size, stride, padding, dilation); }));
  m.def("scale_examples",
        torch::wrap_pybind_function_no_gil(
            [op = operator_of("engm::scale_examples", cpu::scale_examples)](
                const Tensors& tensors, const at::Tensor& weights) { return op.call(tensors, weights); }));
  m.def("weighted_sums",
        torch::wrap_pybind_function_no_gil(
            [op = operator_of("engm::weighted_sums", cpu::weighted_sums)](
                const Tensors& tensors, const at::Tensor& weights) { return op.call(tensors, weights); }));
  m.def("untracked_alias", torch::wrap_pybind_function_no_gil([](const at::Tensor& tensor) {
          return at::_unsafe_view_symint(tensor, tensor.sym_sizes());
        }));
  m.def("all_finite", torch::wrap_pybind_function_no_gil(all_finite));
  // The activations, in the type of the backprops, and these, both by positions.
  m.def("by_position", torch::wrap_pybind_function_no_gil([](const at::Tensor& activations, const at::Tensor& backprops) {
          const at::AutoDispatchBelowADInplaceOrView below_autograd;
          return std::make_pair(by_position(as_type(activations, backprops.scalar_type())), by_position(backprops));
        }));
  // What the terms of linear layers are made of that were called on a row an example: see engm/rules/linear.py.
  m.def("row_terms", torch::wrap_pybind_function_no_gil(row_terms));
  // Of every pair: Σ_it left[i, t, :] ⊗ right[i, t, :]
  m.def("sums_of_outer_products", torch::wrap_pybind_function_no_gil([](const Tensors& left, const Tensors& right) {
          const at::AutoDispatchBelowADInplaceOrView below_autograd;
          Tensors sums;
          sums.reserve(left.size());
          for (size_t k = 0; k < left.size(); ++k)
            sums.push_back(at::mm(left[k].flatten(0, 1).t(), right.at(k).flatten(0, 1)));
          return sums;
        }));
}

}  // namespace engm
