// Whether dictionaries hold the very objects that they held, and tensors are what they were: engm asks it of every
// module of a network at every step, for which Python takes as long as for a layer.
//
// What was there is kept in tuples of Python's, not in objects of C++, so that the garbage collector sees it.
#include "unchanged.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

namespace engm {

namespace {

namespace py = pybind11;

// Whether every object is of the type that it was of.
bool same_types(const py::list& objects, const py::tuple& types) {
  if (objects.size() != types.size()) return false;
  for (size_t k = 0; k < objects.size(); ++k)
    if (reinterpret_cast<PyObject*>(Py_TYPE(objects[k].ptr())) != types[k].ptr()) return false;
  return true;
}

// Whether every dictionary is as long as it was, and has the very values at some keys that it had: `held` has a tuple
// (dictionary, length, keys, values) for each. A length of -1 may be any; the value of a key that was not there is
// NotImplemented.
bool same_items(const py::tuple& held) {
  for (const py::handle& one : held) {
    PyObject* const found = one.ptr();
    TORCH_CHECK_TYPE(PyTuple_Check(found) && PyTuple_GET_SIZE(found) == 4, "expected (dictionary, length, keys, values)");
    PyObject *const dictionary = PyTuple_GET_ITEM(found, 0), *const keys = PyTuple_GET_ITEM(found, 2),
                    *const values = PyTuple_GET_ITEM(found, 3);
    TORCH_CHECK_TYPE(PyTuple_Check(keys) && PyTuple_Check(values) && PyTuple_GET_SIZE(keys) == PyTuple_GET_SIZE(values),
                     "expected as many keys as values");
    if (!PyDict_Check(dictionary)) return false;
    const Py_ssize_t length = PyLong_AsSsize_t(PyTuple_GET_ITEM(found, 1));
    if (length >= 0 && PyDict_Size(dictionary) != length) return false;
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(keys); ++k) {
      PyObject* value = PyDict_GetItemWithError(dictionary, PyTuple_GET_ITEM(keys, k));
      if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
      if (value == nullptr) value = Py_NotImplemented;
      if (value != PyTuple_GET_ITEM(values, k)) return false;
    }
  }
  return true;
}

// What tensors are besides their numbers, as bytes that are equal where they are the same: type, device, whether they
// require grad, and of ordinary ones shape, strides and memory.
py::bytes facts_of(const py::list& tensors) {
  std::string facts;
  const auto add = [&](int64_t value) { facts.append(reinterpret_cast<const char*>(&value), sizeof value); };
  for (const py::handle one : tensors) {
    TORCH_CHECK_TYPE(THPVariable_Check(one.ptr()), "expected tensors");
    const at::Tensor& tensor = THPVariable_Unpack(one.ptr());
    add(static_cast<int64_t>(tensor.scalar_type()));
    add(static_cast<int64_t>(tensor.device().type()));
    add(tensor.device().index());
    add(static_cast<int64_t>(tensor.layout()));
    add(tensor.requires_grad());
    const bool plain = tensor.layout() == at::kStrided && !tensor.is_nested() && !tensor.is_meta() &&
                       !tensor.key_set().has(c10::DispatchKey::Python);
    add(plain);
    if (!plain) continue;  // others are told apart by who they are alone
    add(tensor.dim());
    for (const int64_t size : tensor.sizes()) add(size);
    for (const int64_t stride : tensor.strides()) add(stride);
    add(reinterpret_cast<int64_t>(tensor.const_data_ptr()));
  }
  return facts;
}

}  // namespace

void bind_unchanged(py::module_& m) {
  m.def("same_types", &same_types);
  m.def("same_items", &same_items);
  m.def("facts_of", &facts_of);
}

}  // namespace engm
