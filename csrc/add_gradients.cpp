// Gradients are added to `.grad` of many parameters at once, as autograd adds them (engm/optim/batch.py): Python takes as
// long for each parameter as a small one's sum.
#include "add_gradients.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/utils/grad_layout_contract.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>
#include <vector>

namespace engm {

namespace {

// The gradient in the type that the parameter's gradients have, and in its shape unless it is sparse.
at::Tensor in_form_of(const at::Tensor& parameter, const at::Tensor& gradient) {
  const at::ScalarType type = parameter.grad_dtype().value_or(gradient.scalar_type());
  const at::Tensor typed = gradient.scalar_type() == type ? gradient : gradient.to(type);
  return typed.is_sparse() || typed.sizes() == parameter.sizes() ? typed : typed.view(parameter.sizes());
}

// A first gradient lies in memory as its parameter does: fused optimizers walk through both side by side.
at::Tensor laid_out_as(const at::Tensor& parameter, const at::Tensor& gradient) {
  using namespace torch::autograd::utils;
  const bool strided = gradient.layout() == at::kStrided && parameter.layout() == at::kStrided;
  return !strided || obeys_layout_contract(gradient, parameter) ? gradient : clone_obey_contract(gradient, parameter);
}

// A gradient stays sparse until a dense one is added. Gradients that were there before may have a graph, as behind
// create_graph=True, which goes on without what is added. What cannot be added to is refused before anything is.
void add_gradients(const std::vector<std::pair<at::Tensor, at::Tensor>>& pairs) {
  const at::NoGradGuard without_graph;
  for (const auto& [parameter, given] : pairs) {
    const at::Tensor& sum = parameter.grad();
    TORCH_CHECK(
        !sum.defined() || !sum.is_inference() || c10::InferenceMode::is_enabled(),
        "engm: the .grad of a parameter was made in inference mode, so nothing can be added to it: set it to None");
  }
  for (const auto& [parameter, given] : pairs) {
    const at::Tensor gradient = in_form_of(parameter, given);
    at::Tensor& sum = parameter.mutable_grad();
    if (!sum.defined())
      sum = laid_out_as(parameter, gradient);
    else if (sum.is_sparse() && !gradient.is_sparse())
      sum = at::add(gradient, sum);
    else
      sum.add_(gradient);
  }
}

}  // namespace

void bind_add_gradients(pybind11::module_& m) {
  m.def("add_gradients", torch::wrap_pybind_function_no_gil(add_gradients));
}

}  // namespace engm
