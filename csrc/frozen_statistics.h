// Declares the binding of backward passes that take batch statistics for constants to Python.
#pragma once

#include <pybind11/pybind11.h>

namespace engm {

void bind_frozen_statistics(pybind11::module_& m);

}  // namespace engm
