// Declares the binding of what tells quickly that objects are where they were.
#pragma once

#include <pybind11/pybind11.h>

namespace engm {

void bind_unchanged(pybind11::module_& m);

}  // namespace engm
