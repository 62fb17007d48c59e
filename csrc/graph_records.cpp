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
#include <optional>
#include <typeinfo>
#include <utility>
#include <vector>

namespace engm {

namespace {

namespace py = pybind11;
using torch::autograd::FunctionPreHook;
using torch::autograd::Node;
using torch::autograd::variable_list;

// Attributes by names that are made once.
struct Names {
  py::str capture{"capture"}, queue{"queue"}, receive{"receive"}, arranged{"arranged"}, activations{"_activations"};
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

// Whether only the graph keeps what a call read, which is gone as soon as its node has run.
bool is_held_weakly(py::handle call) {
  const py::object activations = attribute(call, names().activations);
  if (!PyTuple_Check(activations.ptr())) return PyWeakref_Check(activations.ptr());
  const auto all = py::reinterpret_borrow<py::tuple>(activations);
  return std::any_of(all.begin(), all.end(), [](py::handle one) { return PyWeakref_Check(one.ptr()) != 0; });
}

// What a gradient, or a tuple of gradients and Nones, takes in memory, and how often they were written into in all;
// nothing where one of them has no memory of the usual kind.
struct Held {
  int64_t bytes = 0;
  uint32_t version = 0;
  std::optional<c10::Stream> stream;  // on which they are computed; none on the CPU

  static std::optional<Held> of(py::handle gradients) {
    Held held;
    if (THPVariable_Check(gradients.ptr())) return held.add(gradients) ? std::optional(held) : std::nullopt;
    for (const py::handle one : py::reinterpret_borrow<py::tuple>(gradients))
      if (!one.is_none() && !held.add(one)) return std::nullopt;
    return held;
  }

 private:
  bool add(py::handle gradient) {
    const at::Tensor& tensor = THPVariable_Unpack(gradient.ptr());
    if (tensor.layout() != at::kStrided || tensor.is_nested() || tensor.is_inference()) return false;
    const std::optional<int64_t> elements = tensor.sym_numel().maybe_as_int();
    if (!elements) return false;
    bytes += *elements * static_cast<int64_t>(tensor.element_size());
    version += tensor._version();
    if (!tensor.is_cpu() && !stream) {
      const c10::impl::VirtualGuardImpl devices(tensor.device().type());
      stream = devices.getStream(tensor.device());
    }
    return true;
  }
};

}  // namespace

// Gradients on their way to a collector. Python between the nodes of a backward pass finds nothing in the processor's
// caches and costs several times what it costs in a loop of its own, so small gradients are handed over together.
class GradientQueue {
 public:
  GradientQueue(py::object collector, int64_t most_bytes) : collector_(std::move(collector)), most_bytes_(most_bytes) {}

  const py::object& collector() const { return collector_; }

  // Hands over the gradients (a tuple: of all outputs) of what was called, soon. With the GIL held.
  void push(py::handle call, py::handle gradients) {
    const std::optional<Held> held = Held::of(gradients);
    if (!held || is_held_weakly(call)) {  // nothing overtakes anything
      flush();
      return call_method(collector_, names().receive, call, gradients);
    }
    bytes_ += held->bytes;
    items_.push_back({py::reinterpret_borrow<py::object>(call), py::reinterpret_borrow<py::object>(gradients), *held});
    if (bytes_ > most_bytes_) flush();
  }

  // Hands over what has not been yet, in order, on the streams and in the grad mode of the backward pass.
  void flush() {
    bytes_ = 0;
    const std::vector<Item> items = std::exchange(items_, {});
    const at::NoGradGuard without_graph;
    for (const Item& item : items) {
      const c10::OptionalStreamGuard stream(item.held.stream);
      if (Held::of(item.gradients)->version != item.held.version) {
        PyErr_SetString(PyExc_RuntimeError,
                        "engm: a gradient was modified in place by the backward function or hook that it was handed "
                        "to, so norms would be wrong. Return a new tensor there.");
        throw python_error();
      }
      call_method(collector_, names().receive, item.call, item.gradients);
    }
  }

 private:
  struct Item {
    py::object call, gradients;
    Held held;
  };

  py::object collector_;
  int64_t most_bytes_, bytes_ = 0;
  std::vector<Item> items_;
};

namespace {

// Hands a gradient (a tuple of all, None where there is none) to the collector of the record's forward pass. In any
// other backward pass, one that frees the graph has no more use for the activations either.
void take(py::handle record, py::handle gradients, bool all) {
  const py::object queue = attribute(attribute(record, names().capture), names().queue);
  if (queue.is_none()) {
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
    queue.cast<GradientQueue&>().push(record, arranged);
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
  py::class_<GradientQueue>(m, "GradientQueue")
      .def(py::init<py::object, int64_t>())
      .def_property_readonly("collector", &GradientQueue::collector)
      .def("flush", [](GradientQueue& queue) {
        try {
          queue.flush();
        } catch (const python_error&) {
          throw py::error_already_set();
        }
      });
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
