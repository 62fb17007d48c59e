// Declares the binding of the cost model and its tables to Python.
#pragma once

#include <pybind11/pybind11.h>

namespace engm {

void bind_cost_model(pybind11::module_& m);

}  // namespace engm
