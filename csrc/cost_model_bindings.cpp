// Binds the cost model and its tables to Python, with devices and precisions by name.
#include "cost_model_bindings.h"

#include <pybind11/stl.h>

#include <cmath>

#include "cost_model.h"
#include "precision.h"

namespace py = pybind11;

namespace engm {
namespace {

using cuda::Precision;

constexpr std::pair<const char*, double CostTable::*> kConstants[] = {
    {"tile_steps", &CostTable::tile_steps},
    {"direct_element", &CostTable::direct_element},
    {"direct_last_element", &CostTable::direct_last_element},
    {"gram_flop", &CostTable::gram_flop},
    {"gram_element", &CostTable::gram_element},
    {"gram_last_element", &CostTable::gram_last_element},
    {"tap_flop", &CostTable::tap_flop},
    {"gram_block", &CostTable::gram_block},
    {"product_flop", &CostTable::product_flop},
    {"product_element", &CostTable::product_element},
    {"product_example", &CostTable::product_example},
};

constexpr std::pair<const char*, Precision> kPrecisionNames[] = {
    {"tf32", Precision::kTf32},       {"float32", Precision::kFloat32}, {"bfloat16", Precision::kBFloat16},
    {"float16", Precision::kFloat16}, {"float64", Precision::kFloat64},
};

Precision parse_precision(const std::string& name) {
  for (const auto& [known, precision] : kPrecisionNames)
    if (name == known) return precision;
  throw py::value_error("precision must be 'tf32', 'float32', 'bfloat16', 'float16' or 'float64', got '" + name + "'.");
}

int parse_device(const std::string& name) {
  if (name == "cpu") return kCpuDevice;
  if (name == "cuda") return 0;
  const bool index = name.size() > 5 && name.size() < 9 && name.find_first_not_of("0123456789", 5) == std::string::npos;
  if (name.rfind("cuda:", 0) != 0 || !index)
    throw py::value_error("device must be 'cpu', 'cuda' or 'cuda:<index>', got '" + name + "'.");
  return std::stoi(name.substr(5));
}

std::string device_name(int device) { return device == kCpuDevice ? "cpu" : "cuda:" + std::to_string(device); }

py::dict as_dict(const CostTable& table) {
  py::dict values;
  for (const auto& [name, constant] : kConstants) values[name] = table.*constant;
  return values;
}

// Sets the constants that are given; the others stay as they are in `table`.
void update(CostTable& table, const py::dict& values) {
  for (const auto& [key, value] : values) {
    const std::string given = py::str(key);
    double CostTable::*constant = nullptr;
    std::string known;
    for (const auto& [name, member] : kConstants) {
      known += (known.empty() ? "" : ", ") + std::string(name);
      if (given == name) constant = member;
    }
    if (constant == nullptr)
      throw py::value_error("'" + given + "' is no constant of the cost model; it has " + known + ".");
    table.*constant = value.cast<double>();
    if (!std::isfinite(table.*constant) || table.*constant < 0)
      throw py::value_error("the cost model's '" + given + "' must be finite and not negative, got " +
                            std::string(py::str(value)) + ".");
  }
}

void set_cost_table(const std::string& device_text, const py::dict& values, const std::optional<std::string>& precision,
                    const std::string& source) {
  const int device = parse_device(device_text);
  std::vector<std::pair<Precision, CostTable>> changed;
  for (const auto& [name, each] : kPrecisionNames)
    if (!precision || parse_precision(*precision) == each) {
      changed.emplace_back(each, table_in_use(device, each));
      update(changed.back().second, values);
    }
  for (const auto& [each, table] : changed) set_table(device, each, table, source);
}

std::string cuda_precision(const std::string& dtype, bool convolution) {
  const Precision wanted = dtype == "float32" ? precision_of(at::kFloat, convolution) : parse_precision(dtype);
  for (const auto& [name, precision] : kPrecisionNames)
    if (wanted == precision) return name;
  return dtype;
}

// The loader is never destroyed: the interpreter may be gone by then.
py::function* table_loader = nullptr;

void call_table_loader(int device) {
  const py::gil_scoped_acquire gil;
  (*table_loader)(device_name(device));
}

std::array<int64_t, 3> three(const std::vector<int64_t>& values, int64_t fill) {
  if (values.empty() || values.size() > 3) throw py::value_error("expected one to three spatial values");
  std::array<int64_t, 3> all{fill, fill, fill};
  std::copy(values.begin(), values.end(), all.end() - static_cast<std::ptrdiff_t>(values.size()));
  return all;
}

CostTable table_for(const std::string& device, const std::string& precision) {
  return table_in_use(parse_device(device), parse_precision(precision));
}

}  // namespace

void bind_cost_model(py::module_& m) {
  py::class_<Cost>(m, "Cost", "What one example costs in either form, and the form that is taken.")
      .def_readonly("direct_flops", &Cost::direct_flops)
      .def_readonly("gram_flops", &Cost::gram_flops)
      .def_readonly("elements", &Cost::elements)
      .def_readonly("direct_parts", &Cost::direct_parts,
                    "FLOPs, FLOPs of one step, elements, elements of maps with channels last.")
      .def_readonly("gram_parts", &Cost::gram_parts,
                    "FLOPs, elements, elements of maps with channels last, numbers added over taps, blocks, and FLOPs, "
                    "elements and examples of matrix products.")
      .def_readonly("direct_time", &Cost::direct_time, "In FLOPs of the direct form.")
      .def_readonly("gram_time", &Cost::gram_time, "In FLOPs of the direct form.")
      .def_property_readonly("form", [](const Cost& cost) { return form_name(cost.form); })
      .def("bytes", [](const Cost& cost, int64_t element_size) { return cost.elements * element_size; },
           py::arg("element_size") = 4, "Bytes of both operands of one example, read once.");
  m.def(
      "linear_cost",
      [](int64_t T, int64_t p, int64_t d, const std::string& device, const std::string& precision) {
        return linear_cost(T, p, d, table_for(device, precision));
      },
      py::arg("T"), py::arg("p"), py::arg("d"), py::arg("device") = "cpu", py::arg("precision") = "float32");
  m.def(
      "conv_cost",
      [](int64_t channels, int64_t out_channels, const std::vector<int64_t>& kernel_size,
         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
         int64_t groups, const std::vector<int64_t>& input_size, const std::vector<int64_t>& output_size,
         const std::string& device, const std::string& precision, bool channels_last) {
        return conv_cost(channels, out_channels, three(kernel_size, 1), three(stride, 1), three(padding, 0),
                         three(dilation, 1), groups, three(input_size, 1), three(output_size, 1),
                         channels_last, table_for(device, precision));
      },
      py::arg("channels"), py::arg("out_channels"), py::arg("kernel_size"), py::arg("stride"), py::arg("padding"),
      py::arg("dilation"), py::arg("groups"), py::arg("input_size"), py::arg("output_size"), py::arg("device") = "cpu",
      py::arg("precision") = "float32", py::arg("channels_last") = false);
  m.def(
      "cost_table",
      [](const std::string& device, const std::string& precision, bool builtin) {
        const int index = parse_device(device);
        const Precision parsed = parse_precision(precision);
        return as_dict(builtin ? builtin_table(index, parsed) : table_in_use(index, parsed));
      },
      py::arg("device") = "cpu", py::arg("precision") = "float32", py::arg("builtin") = false,
      "The constants in use on a device, in FLOPs of its direct form, or those built in.");
  m.def("cost_table_source", [](const std::string& device) { return table_source(parse_device(device)); },
        py::arg("device") = "cpu", "\"built-in\", or where the table in use comes from.");
  m.def("set_cost_table", &set_cost_table, py::arg("device"), py::arg("values"), py::arg("precision") = py::none(),
        py::arg("source") = "set by hand",
        "Replaces constants of a device, of one precision or all; those not named stay as they are.");
  m.def("reset_cost_tables", &reset_tables, "Back to the built-in tables; saved ones are looked for again.");
  m.def("set_cost_table_loader",
        [](py::function loader) {
          delete table_loader;
          table_loader = new py::function(std::move(loader));
          set_table_loader(&call_table_loader);
        },
        py::arg("loader"), "Called with a device's name before its table is first used.");
  m.def("cuda_precision", &cuda_precision, py::arg("dtype"), py::arg("convolution"),
        "How the CUDA kernels form products of a dtype: float32 as torch.backends allows TF32 or not.");
}

}  // namespace engm
