// Declares the binding of the walk through an autograd graph to Python.
#pragma once

#include <pybind11/pybind11.h>

namespace engm {

void bind_graph_walk(pybind11::module_& m);

}  // namespace engm
