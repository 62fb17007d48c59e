// Recording the calls of a network's layers (engm/capture/calls.py, engm/capture/hooks.py): what happens at every call
// of every layer. In Python it takes as long as a small layer itself, and longer than its kernel on a GPU.
#include "captured_calls.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/_unsafe_view.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "graph_records.h"

namespace engm {

namespace {

namespace py = pybind11;
using torch::autograd::Edge;

// Attributes and methods by names that are made once; never freed, for the interpreter may be gone by then.
struct Names {
  py::str parameters_of_module{"_parameters"}, requires_grad{"requires_grad"};
  py::str capture{"capture"}, name{"name"}, module{"module"}, rule{"rule"}, parameters{"parameters"},
      couples{"couples"}, saved{"saved"}, shape{"shape"}, batch{"batch"}, output_nr{"output_nr"}, producer{"producer"},
      slot{"slot"}, reads{"reads"}, options{"options"}, activations{"_activations"}, versions{"_versions"};
  py::str takes{"activations"}, picks{"picks"}, may_couple{"may_couple"}, reads_for{"reads_for"}, saves{"saves"},
      save{"_save"}, given{"_note_given"}, input_nodes{"input_nodes"}, input_storages{"input_storages"},
      input_is_index{"input_is_index"};
  py::str mean{"_saved_result1"}, rstd{"_saved_result2"}, packs{"packs"};
  py::frozenset no_storages{py::set()};
  py::tuple no_arguments{0};
};

const Names& names() {
  static const Names* const made = new Names;
  return *made;
}

py::object stolen(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

py::object get(py::handle object, const py::str& name) { return stolen(PyObject_GetAttr(object.ptr(), name.ptr())); }

void set(py::handle object, const py::str& name, py::handle value) {
  if (PyObject_SetAttr(object.ptr(), name.ptr(), value.ptr()) != 0) throw py::error_already_set();
}

template <class... Arguments>
py::object call(py::handle object, const py::str& method, const Arguments&... arguments) {
  PyObject* const all[] = {object.ptr(), arguments.ptr()...};
  return stolen(PyObject_VectorcallMethod(method.ptr(), all, 1 + sizeof...(arguments), nullptr));
}

bool is_true(const py::object& value) {
  const int found = PyObject_IsTrue(value.ptr());
  if (found < 0) throw py::error_already_set();
  return found != 0;
}

bool is_tensor(py::handle object) { return THPVariable_Check(object.ptr()); }

py::tuple packed(const std::vector<py::object>& objects) {
  py::tuple all(objects.size());
  for (size_t k = 0; k < objects.size(); ++k) PyTuple_SET_ITEM(all.ptr(), k, objects[k].inc_ref().ptr());
  return all;
}

// A number that every in-place operation changes; 0 in inference mode, which counts none.
py::object version_of(const at::Tensor& tensor) { return py::int_(tensor.is_inference() ? 0 : tensor._version()); }

// The address of a tensor's memory; 0 where there is none, as inside of a function transform.
int64_t address_of(const at::Tensor& tensor) {
  return tensor.has_storage() ? reinterpret_cast<int64_t>(tensor.storage().data()) : 0;
}

// The module's own parameters that require grad, by name.
py::dict trained_of(py::handle module) {
  py::dict trained;
  const py::object own = get(module, names().parameters_of_module);
  const auto look = [&](py::handle key, py::handle parameter) {
    if (parameter.is_none()) return;
    const bool wanted = is_tensor(parameter) ? THPVariable_Unpack(parameter.ptr()).requires_grad()
                                             : is_true(get(parameter, names().requires_grad));
    if (wanted && PyDict_SetItem(trained.ptr(), key.ptr(), parameter.ptr()) != 0) throw py::error_already_set();
  };
  if (PyDict_CheckExact(own.ptr())) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(own.ptr(), &at, &key, &value);) look(key, value);
  } else {
    for (const py::handle pair : py::list(own.attr("items")())) look(pair[py::int_(0)], pair[py::int_(1)]);
  }
  return trained;
}

// Notes what a call read: a tensor, or a tuple of tensors and Nones.
void note_inputs(py::handle self, py::handle activations, bool reads) {
  const bool several = PyTuple_Check(activations.ptr());
  const size_t count = several ? PyTuple_GET_SIZE(activations.ptr()) : 1;
  std::vector<py::object> nodes, given;
  py::object versions = several ? py::tuple(count) : py::object();
  for (size_t k = 0; k < count; ++k) {
    const py::handle one = several ? py::handle(PyTuple_GET_ITEM(activations.ptr(), k)) : activations;
    py::object version = py::none();
    if (!one.is_none() || !several) {
      TORCH_CHECK_TYPE(is_tensor(one), "expected tensors");
      const at::Tensor& tensor = THPVariable_Unpack(one.ptr());
      if (const auto& node = tensor.grad_fn()) {
        nodes.push_back(stolen(torch::autograd::functionToPyObject(node)));
      } else {
        given.push_back(py::reinterpret_borrow<py::object>(one));
      }
      version = version_of(tensor);
    }
    if (several) {
      PyTuple_SET_ITEM(versions.ptr(), k, version.release().ptr());
    } else {
      versions = std::move(version);
    }
  }
  set(self, names().versions, versions);
  set(self, names().input_nodes, packed(nodes));
  set(self, names().activations, reads ? activations : py::handle(Py_None));
  if (given.empty()) {
    set(self, names().input_storages, names().no_storages);
    set(self, names().input_is_index, py::bool_(false));
  } else {
    call(self, names().given, packed(given));
  }
}

void belongs_to(py::handle self, py::handle capture, py::handle name, py::handle module, py::handle rule) {
  set(self, names().capture, capture);
  set(self, names().name, name);
  set(self, names().module, module);
  set(self, names().rule, rule);
}

// The shape of a tensor, with -1 for the dimensions that a nested tensor which is not jagged has no number for.
py::object shape_of(py::handle output) {
  const at::Tensor& tensor = THPVariable_Unpack(output.ptr());
  if (!tensor.is_nested() || tensor.layout() != at::kStrided) return get(output, names().shape);
  py::tuple shape(tensor.dim());
  shape[0] = py::int_(tensor.size(0));
  for (size_t k = 1; k < shape.size(); ++k) shape[k] = py::int_(-1);
  return shape;
}

// Mean and reciprocal standard deviation that autograd saved for a layer whose operator makes nodes of that name,
// detached. None where hooks pack what is saved (activation checkpointing), where the numbers were rounded to 16 bits,
// and where nothing was saved.
py::object saved_statistics(py::handle output, const std::string& name) {
  TORCH_CHECK_TYPE(is_tensor(output), "expected a tensor");
  const at::Tensor& tensor = THPVariable_Unpack(output.ptr());
  const auto& node = tensor.grad_fn();
  if (node == nullptr || at::SavedTensorDefaultHooks::get_hooks(/*ignore_is_tracing=*/true).has_value())
    return py::none();
  const py::object object = stolen(torch::autograd::functionToPyObject(node));
  // A function in Python may have the name of an operator, and has saved nothing under these names.
  if (!torch::autograd::THPCppFunction_Check(object.ptr())) return py::none();
  std::string_view kind = Py_TYPE(object.ptr())->tp_name;
  kind.remove_prefix(kind.rfind('.') + 1);  // nothing where there is no module in front
  if (kind.substr(0, name.size()) != name) return py::none();
  const py::object mean = get(object, names().mean), rstd = get(object, names().rstd);
  if (!is_tensor(mean) || !is_tensor(rstd)) return py::none();
  const at::Tensor &first = THPVariable_Unpack(mean.ptr()), &second = THPVariable_Unpack(rstd.ptr());
  const auto type = second.scalar_type();
  if (type == at::kHalf || type == at::kBFloat16 || (first.numel() == 0 && tensor.numel() != 0)) return py::none();
  return py::make_tuple(first.detach(), second.detach());
}

// Whether the terms of parameters need the activations, see Rule.reads_for.
bool reads_activations(py::handle rule, const py::dict& trained) {
  if (trained.empty()) return false;
  const py::object wanted = get(rule, names().reads_for);
  if (wanted.is_none()) return true;
  for (const auto& [name, parameter] : trained) {
    const int found = PySequence_Contains(wanted.ptr(), name.ptr());
    if (found < 0) throw py::error_already_set();
    if (found != 0) return true;
  }
  return false;
}

// The number of the input of a tensor's node that another tensor is: the first of an operator's, any of a compiled
// region's. It is 0 where the tensor was cast on the way or no gradient goes to it.
int64_t slot_of(const at::Tensor& output, const at::Tensor& input) {
  const auto& node = output.grad_fn();
  if (node == nullptr || !input.requires_grad()) return 0;
  const Edge edge = torch::autograd::impl::gradient_edge(input);
  const auto& edges = node->next_edges();
  for (size_t slot = 0; slot < edges.size(); ++slot)
    if (edges[slot] == edge) return static_cast<int64_t>(slot);
  return 0;
}

// The call that made a tensor, or None: one of the records on its node.
py::object producer_of(const at::Tensor& tensor, py::handle kind) {
  if (const auto& node = tensor.grad_fn(); node != nullptr)
    for (const py::object& record : read_records(*node)) {
      if (PyObject_IsInstance(record.ptr(), kind.ptr()) != 1) continue;
      if (get(record, names().output_nr).cast<int64_t>() == tensor.output_nr()) return record;
    }
  return py::none();
}

// What a module has under the names of its rule's options.
py::object options_of(py::handle module, py::handle rule) {
  const py::tuple wanted = get(rule, names().options);
  py::tuple found(wanted.size());
  for (size_t k = 0; k < wanted.size(); ++k)
    PyTuple_SET_ITEM(found.ptr(), k, get(module, py::reinterpret_borrow<py::str>(wanted[k])).release().ptr());
  return found;
}

// Fills in a call of a module with a rule (engm.capture.calls.Call); `kind` is the class of calls.
void note_call(py::handle self, py::handle kind, py::handle capture, py::handle name, py::handle module,
               py::handle rule, py::handle activations, py::handle output) {
  TORCH_CHECK_TYPE(is_tensor(output), "expected a tensor");
  belongs_to(self, capture, name, module, rule);
  if (at::SavedTensorDefaultHooks::get_hooks(/*ignore_is_tracing=*/true).has_value())
    set(capture, names().packs, py::bool_(true));
  const py::dict trained = trained_of(module);
  set(self, names().parameters, trained);
  const bool couples = is_true(get(rule, names().may_couple)) && is_true(call(rule, names().couples, module));
  set(self, names().couples, py::bool_(couples));
  const bool saves = (couples || !trained.empty()) && is_true(get(rule, names().saves));
  set(self, names().saved, saves ? call(self, names().save, activations, output) : py::none());
  const py::object shape = shape_of(output);
  const at::Tensor& tensor = THPVariable_Unpack(output.ptr());
  set(self, names().shape, shape);
  set(self, names().batch, PyTuple_GET_SIZE(shape.ptr()) ? py::handle(PyTuple_GET_ITEM(shape.ptr(), 0)) : py::int_(0));
  set(self, names().output_nr, py::int_(tensor.output_nr()));
  const bool reads = couples || reads_activations(rule, trained);
  set(self, names().reads, py::bool_(reads));
  set(self, names().options, options_of(module, rule));
  const bool fed = couples && is_tensor(activations);
  const at::Tensor& input = fed ? THPVariable_Unpack(activations.ptr()) : tensor;
  set(self, names().producer, fed ? producer_of(input, kind) : py::none());
  set(self, names().slot, py::int_(fed ? slot_of(tensor, input) : 0));
  note_inputs(self, activations, reads);
}

// The forward hook of a module that takes and returns one tensor.
class CallRecorder {
 public:
  // kind: the class of calls; note_call fills one in.
  // refuse: called as (name, module, activations, output) where the call is none of a tensor to a tensor, or where
  //   dispatch modes run, under which a call may be one that has to be refused.
  // copies: whether an output that is a view is replaced by a copy, for the module may have saved what it returned.
  CallRecorder(py::object capture, py::object name, py::object rule, py::type kind, py::object refuse, bool copies)
      : capture_(std::move(capture)),
        name_(std::move(name)),
        rule_(std::move(rule)),
        kind_(std::move(kind)),
        refuse_(std::move(refuse)),
        copies_(copies),
        thread_(PyThread_get_thread_ident()) {}

  py::object operator()(py::handle module, py::handle args, py::handle kwargs, py::object output) const {
    if (PyThread_get_thread_ident() != thread_ || !at::GradMode::is_enabled()) return py::none();
    const bool first = PyTuple_GET_SIZE(args.ptr()) != 0 && !is_true(get(rule_, names().picks));
    py::object activations = first ? py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(args.ptr(), 0))
                                   : call(rule_, names().takes, args, kwargs);
    if (c10::impl::TorchDispatchModeTLS::stack_len() != 0 || !is_tensor(output) || !is_tensor(activations))
      refuse_(name_, module, activations, output);
    py::object replaced = py::none();
    if (const at::Tensor& tensor = THPVariable_Unpack(output.ptr()); tensor.is_view()) {
      // An in-place operation on a view rewrites the history of its base, and the node noted here would drop out of the
      // graph. The same tensor, not tracked as a view, has no such trouble.
      const at::Tensor other = copies_ ? tensor.clone() : at::_unsafe_view_symint(tensor, tensor.sym_sizes());
      output = replaced = stolen(THPVariable_Wrap(other));
    }
    const at::Tensor& tensor = THPVariable_Unpack(output.ptr());
    const auto& node = tensor.grad_fn();
    if (node == nullptr) return py::none();  // nothing here is trained
    if (activations.is(output))              // changed in place; the tensor itself would keep its own graph alive
      activations = stolen(THPVariable_Wrap(tensor.detach()));
    auto* const kind = reinterpret_cast<PyTypeObject*>(kind_.ptr());
    py::object made = stolen(kind->tp_new(kind, names().no_arguments.ptr(), nullptr));
    note_call(made, kind_, capture_, name_, module, rule_, activations, output);
    write_record(*node, std::move(made), tensor.output_nr());
    return replaced;
  }

 private:
  py::object capture_, name_, rule_, kind_, refuse_;
  bool copies_;
  unsigned long thread_;
};

}  // namespace

void bind_captured_calls(py::module_& m) {
  py::class_<CallRecorder>(m, "CallRecorder")
      .def(py::init<py::object, py::object, py::object, py::type, py::object, bool>())
      .def("__call__", &CallRecorder::operator(), py::arg("module"), py::arg("args"), py::arg("kwargs"),
           py::arg("output") = py::none());
  m.def("note_call", &note_call);
  m.def("note_inputs", &note_inputs);
  m.def("address_of", &address_of);
  m.def("trained_of", &trained_of);
  m.def("reads_activations", &reads_activations);
  m.def("slot_of", &slot_of);
  m.def("saved_statistics", &saved_statistics);
}

}  // namespace engm
