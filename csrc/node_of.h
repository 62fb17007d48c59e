// The node of an autograd graph that an object of Python stands for.
#pragma once

#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_function.h>

#include <memory>
#include <type_traits>
#include <utility>

namespace engm {

using NodePointer = std::decay_t<decltype(std::declval<torch::autograd::Edge>().function)>;

// Until torch 2.13 the object of a function in Python does not own its node.
template <class Kind>
NodePointer held(const std::weak_ptr<Kind>& node) {
  return node.lock();
}
template <class Pointer>
NodePointer held(const Pointer& node) {
  return node;
}

inline NodePointer node_of(pybind11::handle object) {
  NodePointer node;
  if (torch::autograd::THPCppFunction_Check(object.ptr())) {
    node = held(reinterpret_cast<torch::autograd::THPCppFunction*>(object.ptr())->cdata);
  } else if (THPFunction_Check(object.ptr())) {
    node = held(reinterpret_cast<THPFunction*>(object.ptr())->cdata);
  }
  TORCH_CHECK_TYPE(node != nullptr, "expected a node of an autograd graph");
  return node;
}

}  // namespace engm
