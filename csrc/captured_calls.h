// Declares the binding of what records the calls of layers (engm/capture) to Python.
#pragma once

#include <pybind11/pybind11.h>

namespace engm {

void bind_captured_calls(pybind11::module_& m);

}  // namespace engm
