// Hooks by which the backward pass of a batch norm takes the batch's statistics for constants
// (engm/batch_norm/frozen.py): one for every batch norm of a network in every norm pass.
#include "frozen_statistics.h"

#include <ATen/ops/mul.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <utility>
#include <vector>

#include "held_object.h"
#include "node_of.h"

namespace engm {

namespace {

namespace py = pybind11;
using torch::autograd::variable_list;
// gain * gy in the type of the gradient whose place it takes. The interpreter's lock is held.
at::Tensor with_constant_statistics(py::handle gain, const at::Tensor& gy, const at::Tensor& replaced) {
  const py::object found = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(gain.ptr()));
  if (!found) throw python_error();
  TORCH_CHECK_TYPE(THPVariable_Check(found.ptr()), "expected a tensor");
  std::vector<int64_t> shape(gy.dim() - 1, 1);
  shape[0] = -1;
  return at::mul(gy, THPVariable_Unpack(found.ptr()).view(shape)).to(replaced.scalar_type());
}

// The input's gradient becomes gain * gy.
class ConstantStatistics : public torch::autograd::FunctionPostHook {
 public:
  ConstantStatistics(py::object gain, size_t slot, size_t output)
      : gain_(std::move(gain)), slot_(slot), output_(output) {}

  variable_list operator()(const variable_list& inputs, const variable_list& outputs) override {
    variable_list found = inputs;
    if (!inputs.at(slot_).defined()) return found;
    const py::gil_scoped_acquire locked;
    found[slot_] = with_constant_statistics(gain_.get(), outputs.at(output_), inputs[slot_]);
    return found;
  }

  // As a hook of Python, for torch's compiled autograd (torch._dynamo.config.compiled_autograd).
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    const py::gil_scoped_acquire locked;
    const auto gain = py::reinterpret_borrow<py::object>(gain_.get());
    const auto hook_of = [gain, slot = slot_, output = output_](const py::sequence& inputs,
                                                                const py::sequence& outputs) {
      py::list found(inputs);
      const py::object replaced = found[slot], gy = outputs[output];
      if (replaced.is_none()) return found;
      try {
        found[slot] = py::reinterpret_steal<py::object>(THPVariable_Wrap(
            with_constant_statistics(gain, THPVariable_Unpack(gy.ptr()), THPVariable_Unpack(replaced.ptr()))));
      } catch (const python_error&) {
        throw py::error_already_set();
      }
      return found;
    };
    py::cpp_function hook(hook_of);
    args.add_post_hook(c10::SafePyObject(hook.release().ptr(), getPyInterpreter()));
  }

 private:
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
