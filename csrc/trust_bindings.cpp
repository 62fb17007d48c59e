// Shows Python which kernels were tried on which device, and what came of it.
#include "trust_bindings.h"

#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <tuple>
#include <vector>

#include "trust.h"

namespace engm {

namespace py = pybind11;

void bind_trust(py::module_& m) {
  // Tuples (kernel, precision, problem, error, limit, failure).
  using Row = std::tuple<std::string, std::string, std::string, double, double, std::string>;
  m.def("self_test", torch::wrap_pybind_function_no_gil([](const at::Device& device) {
          std::vector<Row> rows;
          for (const Trial& t : self_test(device))
            rows.emplace_back(name_of(t.kernel), name_of(t.precision), t.what, t.error, t.limit, t.failure);
          return rows;
        }));
  // Tuples (kernel, precision, reason) of the kernels that failed on a device.
  m.def("distrusted", torch::wrap_pybind_function_no_gil([](const at::Device& device) {
          std::vector<std::tuple<std::string, std::string, std::string>> rows;
          for (const Verdict& v : verdicts())
            if (!v.trusted && v.device == device) rows.emplace_back(name_of(v.kernel), name_of(v.precision), v.reason);
          return rows;
        }));
}

}  // namespace engm
