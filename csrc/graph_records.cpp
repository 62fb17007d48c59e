#include "graph_records.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_hook.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <typeinfo>
#include <utility>

namespace engm {

namespace {

namespace py = pybind11;
using torch::autograd::FunctionPreHook;
using torch::autograd::Node;
using torch::autograd::variable_list;

// Attributes by names that are made once.
struct Names {
  py::str capture{"capture"}, collector{"collector"}, receive{"receive"}, arranged{"arranged"},
      activations{"_activations"};
};

const Names& names() {
  static const Names* const made = new Names;  // never freed: the interpreter may be gone by then
  return *made;
}

py::object attribute(py::handle object, const py::str& name) {
  PyObject* const found = PyObject_GetAttr(object.ptr(), name.ptr());
  if (found == nullptr) throw python_error();
  return py::reinterpret_steal<py::object>(found);
}

py::object wrapped(const at::Tensor& gradient) {
  return gradient.defined() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(gradient)) : py::none();
}

void call_method(py::handle object, const py::str& name, py::handle first, py::handle second) {
  PyObject* const arguments[] = {object.ptr(), first.ptr(), second.ptr()};
  PyObject* const result = PyObject_VectorcallMethod(name.ptr(), arguments, 3, nullptr);
  if (result == nullptr) throw python_error();
  Py_DECREF(result);
}

}  // namespace

variable_list GraphRecord::operator()(const variable_list& gradients) {
  if (output_ == kNone) return gradients;
  const py::gil_scoped_acquire locked;
  const py::object collector = attribute(attribute(object(), names().capture), names().collector);
  if (collector.is_none()) {
    // An ordinary backward pass. One that frees the graph has no more use for the activations either.
    if (!torch::autograd::get_current_graph_task_keep_graph() &&
        PyObject_SetAttr(object().ptr(), names().activations.ptr(), Py_None) != 0)
      throw python_error();
    return gradients;
  }
  if (output_ == kAll) {
    if (std::none_of(gradients.begin(), gradients.end(), [](const at::Tensor& one) { return one.defined(); }))
      return gradients;
    py::tuple every(gradients.size());
    for (size_t k = 0; k < gradients.size(); ++k) every[k] = wrapped(gradients[k]);
    PyObject* const arranged = PyObject_CallMethodOneArg(object().ptr(), names().arranged.ptr(), every.ptr());
    if (arranged == nullptr) throw python_error();
    call_method(collector, names().receive, object(), py::reinterpret_steal<py::object>(arranged));
  } else if (const auto& gradient = gradients.at(output_); gradient.defined()) {
    call_method(collector, names().receive, object(), wrapped(gradient));
  }
  return gradients;
}

void write_record(Node& node, py::object object, int64_t output) {
  node.add_tensor_pre_hook(std::make_unique<GraphRecord>(std::move(object), output));
}

std::vector<py::object> read_records(Node& node) {
  auto& hooks = node.tensor_pre_hooks();
  std::vector<py::object> found;
  if (hooks.empty()) return found;
  const auto foreign = [](const std::unique_ptr<FunctionPreHook>& hook) {
    return dynamic_cast<const GraphRecord*>(hook.get()) == nullptr;
  };
  const auto first = std::stable_partition(hooks.begin(), hooks.end(), foreign);
  for (auto hook = first; hook != hooks.end(); ++hook)
    found.push_back(py::reinterpret_borrow<py::object>(static_cast<const GraphRecord&>(**hook).object()));
  return found;
}

// Whether a list of hooks has one that runs something: torch leaves an empty dictionary behind where hooks of Python were
// taken off. Its classes are known by their names, as their types are not exported.
template <class OfPython, class Hook>
bool any_runs(const std::vector<std::unique_ptr<Hook>>& hooks, const char* name) {
  return std::any_of(hooks.begin(), hooks.end(), [name](const std::unique_ptr<Hook>& hook) {
    if (dynamic_cast<const GraphRecord*>(hook.get()) != nullptr) return false;
    const Hook& one = *hook;
    if (std::strstr(typeid(one).name(), name) == nullptr) return true;
    return PyDict_Size(static_cast<const OfPython&>(one).dict) != 0;
  });
}

bool is_hooked(Node& node) {
  namespace autograd = torch::autograd;
  return any_runs<autograd::PyFunctionTensorPreHook>(node.tensor_pre_hooks(), "PyFunctionTensorPreHook") ||
         any_runs<autograd::PyFunctionPreHook>(node.pre_hooks(), "PyFunctionPreHook") ||
         any_runs<autograd::PyFunctionPostHook>(node.post_hooks(), "PyFunctionPostHook");
}

void bind_graph_records(py::module_& m) {
  m.def("write_record", [](const at::Tensor& output, py::object object, int64_t number) {
    const auto& node = output.grad_fn();
    TORCH_CHECK_VALUE(node != nullptr, "no node made this tensor");
    write_record(*node, std::move(object), number);
  });
  m.def("records_of", [](const at::Tensor& output) {
    const auto& node = output.grad_fn();
    return node == nullptr ? std::vector<py::object>{} : read_records(*node);
  });
  m.attr("ALL_GRADIENTS") = py::int_(static_cast<int64_t>(GraphRecord::kAll));
  m.attr("NO_GRADIENTS") = py::int_(static_cast<int64_t>(GraphRecord::kNone));
}

}  // namespace engm
