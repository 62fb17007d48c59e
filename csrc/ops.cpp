// Registers the operators, and makes the Python module `engm._C` of what is not a tensor operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include "add_gradients.h"
#include "calls.h"
#include "captured_calls.h"
#include "cost_model_bindings.h"
#include "cpu/kernels.h"
#include "frozen_statistics.h"
#include "gradient_prints.h"
#include "graph_records.h"
#include "graph_walk.h"
#include "program.h"
#include "recurrence.h"
#include "row_owners.h"
#include "schemas.h"
#include "trust_bindings.h"
#include "unchanged.h"

#define ENGM_STRING_(x) #x
#define ENGM_STRING(x) ENGM_STRING_(x)

TORCH_LIBRARY(engm, m) { engm::define_operators(m); }
TORCH_LIBRARY_IMPL(engm, CPU, m) { engm::implement_cpu(m); }
#ifdef ENGM_WITH_CUDA
TORCH_LIBRARY_IMPL(engm, CUDA, m) { engm::implement_cuda(m); }
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#ifdef ENGM_WITH_CUDA
  info["cuda"] = true;
  info["cuda_version"] = ENGM_STRING(ENGM_CUDA_VERSION);
  info["cuda_architectures"] = ENGM_STRING(ENGM_CUDA_ARCHITECTURES);
#else
  info["cuda"] = false;
  info["cuda_version"] = py::none();
  info["cuda_architectures"] = "";
#endif
  info["cuda_kernels"] = std::vector<std::string>{};
#ifdef ENGM_WITH_CUDA
  info["cuda_kernels"] = engm::cuda_kernels();
#endif
  info["cpu_isa"] = engm::cpu::isa_in_use();
  info["cpu_isas"] = engm::cpu::available_isas();
  info["cpu_parallel"] = engm::cpu::parallel_backend();
  info["compiler"] = __VERSION__;
  info["torch"] = ENGM_STRING(ENGM_TORCH_VERSION);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of engm: operators in the namespace torch.ops.engm, and what is bound here.";
  engm::bind_cost_model(m);
  engm::bind_add_gradients(m);
  engm::bind_calls(m);
  engm::bind_captured_calls(m);
  engm::bind_frozen_statistics(m);
  engm::bind_gradient_prints(m);
  engm::bind_row_owners(m);
  engm::bind_graph_records(m);
  engm::bind_program(m);
  engm::bind_recurrence(m);
  engm::bind_unchanged(m);
  engm::bind_graph_walk(m);
  engm::bind_trust(m);
  m.def("build_info", &build_info, "What was compiled in and which CPU instruction set is in use.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (!engm::cpu::set_isa(name))
          throw py::value_error("instruction set '" + name + "' is not available here; see build_info()['cpu_isas']");
      },
      py::arg("name"), "Forces the CPU instruction set: \"auto\" or one of build_info()['cpu_isas'].");
}
