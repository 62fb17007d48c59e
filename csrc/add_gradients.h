// Declares the binding of the accumulation of gradients to Python.
#pragma once

#include <pybind11/pybind11.h>

namespace engm {

void bind_add_gradients(pybind11::module_& m);

}  // namespace engm
