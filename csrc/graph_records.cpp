#include "graph_records.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_hook.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
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

// Hands a gradient (a tuple of all, None where there is none) to the collector of the record's forward pass. In any
// other backward pass, one that frees the graph has no more use for the activations either.
void take(py::handle record, py::handle gradients, bool all) {
  const py::object collector = attribute(attribute(record, names().capture), names().collector);
  if (collector.is_none()) {
    if (!torch::autograd::get_current_graph_task_keep_graph() &&
        PyObject_SetAttr(record.ptr(), names().activations.ptr(), Py_None) != 0)
      throw python_error();
  } else if (!gradients.is_none()) {
    py::object arranged = py::reinterpret_borrow<py::object>(gradients);
    if (all) {
      PyObject* const found = PyObject_CallMethodOneArg(record.ptr(), names().arranged.ptr(), gradients.ptr());
      if (found == nullptr) throw python_error();
      arranged = py::reinterpret_steal<py::object>(found);
    }
    call_method(collector, names().receive, record, arranged);
  }
}

}  // namespace

variable_list GraphRecord::operator()(const variable_list& gradients) {
  if (output_ == kNone) return gradients;
  const bool all = output_ == kAll;
  const auto defined = [](const at::Tensor& one) { return one.defined(); };
  const py::gil_scoped_acquire locked;
  if (all ? std::none_of(gradients.begin(), gradients.end(), defined) : !gradients.at(output_).defined()) {
    take(object(), py::none(), all);
  } else if (all) {
    py::tuple every(gradients.size());
    for (size_t k = 0; k < gradients.size(); ++k) every[k] = wrapped(gradients[k]);
    take(object(), every, all);
  } else {
    take(object(), wrapped(gradients[output_]), all);
  }
  return gradients;
}

void GraphRecord::compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const {
  if (output_ == kNone) return;
  const py::gil_scoped_acquire locked;
  const bool all = output_ == kAll;
  const auto record = py::reinterpret_borrow<py::object>(object());
  py::cpp_function hook([record, all](const py::object& gradients) {
    try {
      take(record, gradients, all);
    } catch (const python_error&) {
      throw py::error_already_set();
    }
  });
  c10::SafePyObject held(hook.release().ptr(), getPyInterpreter());
  if (all) {
    args.add_pre_hook(std::move(held));
  } else {
    args.add_tensor_pre_hook(std::move(held), static_cast<int>(output_));
  }
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

// Whether a list of hooks has one that runs something: torch leaves an empty dictionary behind where hooks of Python
// were taken off. Its classes are known by their names, as their types are not exported.
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
