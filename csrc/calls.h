// Declares the binding of the operators to Python.
#pragma once

#include <pybind11/pybind11.h>

namespace engm {

void bind_calls(pybind11::module_& m);

}  // namespace engm
