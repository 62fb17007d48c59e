#pragma once

#include <pybind11/pybind11.h>

namespace engm {

void bind_row_owners(pybind11::module_& m);

}  // namespace engm
