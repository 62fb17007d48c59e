// Hooks by which the backward pass of a batch norm takes the batch's statistics for constants
// (engm/batch_norm/frozen.py): one for every batch norm of a network in every norm pass.
#include "frozen_statistics.h"

#include <ATen/ops/mul.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "held_object.h"

namespace engm {

namespace {

namespace py = pybind11;
using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::variable_list;
using NodePointer = std::decay_t<decltype(std::declval<Edge>().function)>;

// The node that an object of Python stands for. Until torch 2.13 that of a function in Python does not own its node.
template <class Kind>
NodePointer held(const std::weak_ptr<Kind>& node) {
  return node.lock();
}
template <class Pointer>
NodePointer held(const Pointer& node) {
  return node;
}

NodePointer node_of(py::handle object) {
  NodePointer node;
  if (torch::autograd::THPCppFunction_Check(object.ptr())) {
    node = held(reinterpret_cast<torch::autograd::THPCppFunction*>(object.ptr())->cdata);
  } else if (THPFunction_Check(object.ptr())) {
    node = held(reinterpret_cast<THPFunction*>(object.ptr())->cdata);
  }
  TORCH_CHECK_TYPE(node != nullptr, "expected a node of an autograd graph");
  return node;
}

// The input's gradient becomes gain * gy.
class ConstantStatistics : public torch::autograd::FunctionPostHook {
 public:
  ConstantStatistics(py::object gain, size_t slot, size_t output) : gain_(std::move(gain)), slot_(slot), output_(output) {}

  variable_list operator()(const variable_list& inputs, const variable_list& outputs) override {
    if (!inputs.at(slot_).defined()) return inputs;
    const at::Tensor& gy = outputs.at(output_);
    std::vector<int64_t> shape(gy.dim() - 1, 1);
    shape[0] = -1;
    variable_list found = inputs;
    found[slot_] = at::mul(gy, gain().view(shape)).to(inputs[slot_].scalar_type());
    return found;
  }

 private:
  at::Tensor gain() const {
    const py::gil_scoped_acquire locked;
    const py::object found = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(gain_.get().ptr()));
    if (!found) throw python_error();
    TORCH_CHECK_TYPE(THPVariable_Check(found.ptr()), "expected a tensor");
    return THPVariable_Unpack(found.ptr());
  }

  HeldObject gain_;
  size_t slot_, output_;
};

// The hooks on some nodes, until they are taken off.
class FrozenStatistics {
 public:
  // Makes the batch norm of a node take its statistics for constants.
  //   gain    gives scale / sigma, [C], when it is needed
  //   slot    which input of the node is the layer's input
  //   output  which output of the node is the layer's output
  void freeze(py::handle node, py::object gain, size_t slot, size_t output) {
    auto hook = std::make_unique<ConstantStatistics>(std::move(gain), slot, output);
    const auto key = reinterpret_cast<std::uintptr_t>(hook.get());
    nodes_.emplace_back(node_of(node), key);
    nodes_.back().first->add_post_hook(std::move(hook));
  }

  void thaw() {
    for (const auto& [node, key] : nodes_) node->del_post_hook(key);
    nodes_.clear();
  }

 private:
  std::vector<std::pair<NodePointer, std::uintptr_t>> nodes_;
};

}  // namespace

void bind_frozen_statistics(py::module_& m) {
  py::class_<FrozenStatistics>(m, "FrozenStatistics")
      .def(py::init<>())
      .def("freeze", &FrozenStatistics::freeze, py::arg("node"), py::arg("gain"), py::arg("slot"), py::arg("output"))
      .def("thaw", &FrozenStatistics::thaw);
}

}  // namespace engm
