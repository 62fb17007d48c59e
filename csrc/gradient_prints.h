#pragma once

#include <pybind11/pybind11.h>

namespace engm {

void bind_gradient_prints(pybind11::module_& m);

}  // namespace engm
