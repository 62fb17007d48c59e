// Declares the binding of straight-line programs to Python.
#pragma once

#include <pybind11/pybind11.h>

namespace engm {

void bind_program(pybind11::module_& m);

}  // namespace engm
