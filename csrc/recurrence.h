// Declares the binding of the loops of recurrent layers to Python.
#pragma once

#include <pybind11/pybind11.h>

namespace engm {

void bind_recurrence(pybind11::module_& m);

}  // namespace engm
