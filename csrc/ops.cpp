// The operators' schemas, their registration, and the Python module `engm._C` for what is not a tensor operator.
#include "ops.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>
#include <torch/library.h>

#include "cost_model.h"
#include "cpu/kernels.h"

#define ENGM_STRING_(x) #x
#define ENGM_STRING(x) ENGM_STRING_(x)

TORCH_LIBRARY(engm, m) {
  m.def(
      "linear_norm_sq(Tensor a, Tensor b, str form='auto', Tensor? shift=None, Tensor? patch_mean=None, "
      "Tensor? scale=None, Tensor? correlation=None) -> Tensor");
  m.def(
      "conv_norm_sq(Tensor x, Tensor gy, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "int groups=1, str form='auto', Tensor? shift=None, Tensor? patch_mean=None, Tensor? scale=None, "
      "Tensor? correlation=None) -> Tensor");
  m.def("linear_grads(Tensor a, Tensor b) -> (Tensor norm_sq, Tensor grads)");
  m.def(
      "conv_grads(Tensor x, Tensor gy, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "int groups=1) -> (Tensor norm_sq, Tensor grads)");
  m.def(
      "affine_norm_sq(Tensor x, Tensor gy, Tensor? mean, Tensor rstd, int channel_dim) -> "
      "(Tensor norm_sq, Tensor scale_grads, Tensor shift_grads)");
  m.def(
      "clip_weights(Tensor squared_norms, float alpha, Tensor? factors=None) -> (Tensor norms, Tensor weights)");
  m.def("scaled_accumulate(Tensor? a, Tensor b, Tensor weights) -> Tensor", engm::scaled_accumulate);
}

TORCH_LIBRARY_IMPL(engm, CPU, m) {
  m.impl("linear_norm_sq", engm::cpu::linear_norm_sq);
  m.impl("conv_norm_sq", engm::cpu::conv_norm_sq);
  m.impl("linear_grads", engm::cpu::linear_grads);
  m.impl("conv_grads", engm::cpu::conv_grads);
  m.impl("affine_norm_sq", engm::cpu::affine_norm_sq);
  m.impl("clip_weights", engm::cpu::clip_weights);
}

#ifdef ENGM_WITH_CUDA
TORCH_LIBRARY_IMPL(engm, CUDA, m) { m.impl("clip_weights", engm::cuda::clip_weights); }
#endif

namespace py = pybind11;

namespace {

std::array<int64_t, 3> three(const std::vector<int64_t>& values, int64_t fill) {
  if (values.empty() || values.size() > 3) throw py::value_error("expected one to three spatial values");
  std::array<int64_t, 3> all{fill, fill, fill};
  std::copy(values.begin(), values.end(), all.end() - static_cast<std::ptrdiff_t>(values.size()));
  return all;
}

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
  info["cuda_kernels"] = info["cuda"].cast<bool>() ? std::vector<std::string>{"clip_weights"} : std::vector<std::string>{};
  info["cpu_isa"] = engm::cpu::isa_in_use();
  info["cpu_isas"] = engm::cpu::available_isas();
  info["compiler"] = __VERSION__;
  info["torch"] = ENGM_STRING(ENGM_TORCH_VERSION);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of engm: operators in the namespace torch.ops.engm, and what is bound here.";
  py::class_<engm::Cost>(m, "Cost", "What one example costs in either form, and the form that is taken.")
      .def_readonly("direct_flops", &engm::Cost::direct_flops)
      .def_readonly("gram_flops", &engm::Cost::gram_flops)
      .def_readonly("elements", &engm::Cost::elements)
      .def_property_readonly("form", [](const engm::Cost& cost) { return engm::form_name(cost.form); })
      .def("bytes", [](const engm::Cost& cost, int64_t element_size) { return cost.elements * element_size; },
           py::arg("element_size") = 4, "Bytes of both operands of one example, read once.");
  m.def("linear_cost", &engm::linear_cost, py::arg("T"), py::arg("p"), py::arg("d"));
  m.def(
      "conv_cost",
      [](int64_t channels, int64_t out_channels, const std::vector<int64_t>& kernel_size,
         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
         int64_t groups, const std::vector<int64_t>& input_size, const std::vector<int64_t>& output_size) {
        return engm::conv_cost(channels, out_channels, three(kernel_size, 1), three(stride, 1), three(padding, 0),
                               three(dilation, 1), groups, three(input_size, 1), three(output_size, 1));
      },
      py::arg("channels"), py::arg("out_channels"), py::arg("kernel_size"), py::arg("stride"), py::arg("padding"),
      py::arg("dilation"), py::arg("groups"), py::arg("input_size"), py::arg("output_size"));
  m.def("build_info", &build_info, "What was compiled in and which CPU instruction set is in use.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (!engm::cpu::set_isa(name))
          throw py::value_error("instruction set '" + name + "' is not available here; see build_info()['cpu_isas']");
      },
      py::arg("name"), "Forces the CPU instruction set: \"auto\" or one of build_info()['cpu_isas'].");
}
