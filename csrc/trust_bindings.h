// Declares the binding of kernels' trials and verdicts to Python.
#pragma once

#include <pybind11/pybind11.h>

namespace engm {

void bind_trust(pybind11::module_& m);

}  // namespace engm
