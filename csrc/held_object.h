// A Python object that C++ owns and may let go of on any thread, as autograd does with what hangs on its nodes.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

namespace engm {

class HeldObject {
 public:
  explicit HeldObject(pybind11::object object) : object_(object.release()) {}
  ~HeldObject() {
    if (!Py_IsInitialized()) return;  // it is gone with the interpreter
    const pybind11::gil_scoped_acquire locked;
    object_.dec_ref();
  }
  HeldObject(const HeldObject&) = delete;
  HeldObject& operator=(const HeldObject&) = delete;

  pybind11::handle get() const { return object_; }

 private:
  pybind11::handle object_;
};

}  // namespace engm
