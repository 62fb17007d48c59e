// A straight-line program of operators, run one after another without Python: engm/recording/program.py builds it.
//
// Every value has a place. Inputs come first, tensors that were there before the program (parameters, buffers) among them,
// and each operator puts its results into places of its own, which are emptied as soon as nothing reads them any more.
// Operators are called through the dispatcher below autograd: the program has its own
// backward pass in it.
#include "program.h"

#include <ATen/ScalarOps.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <pybind11/stl.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <optional>
#include <string>
#include <vector>

namespace engm {

namespace {

namespace py = pybind11;

// One argument of a call: a constant, the value at a place, or a list of values (a place of -1 is None).
struct Argument {
  c10::IValue constant;
  std::vector<int64_t> places;
  bool is_list = false, is_optional_list = false;
};

struct Call {
  c10::OperatorHandle op;
  std::vector<Argument> arguments;
  int64_t first_result, results;
  std::vector<int64_t> last_read;  // places that nothing reads afterwards
};

class StraightLine {
 public:
  StraightLine(int64_t places, std::vector<int64_t> inputs, std::vector<int64_t> outputs)
      : places_(places), inputs_(std::move(inputs)), outputs_(std::move(outputs)) {}

  // `arguments` has a value for each argument of the schema, or fewer where the rest have their defaults: a tuple
  // (place,) stands for the value at a place, a list of places and Nones in a tuple for a list of tensors, and
  // anything else in a list of one for itself.
  void add(const std::string& name, const std::string& overload, const py::list& arguments, int64_t first_result,
           int64_t results, std::vector<int64_t> last_read) {
    Call call{c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str()), {}, first_result, results,
              std::move(last_read)};
    const auto& schema = call.op.schema().arguments();
    for (size_t k = 0; k < schema.size(); ++k) {
      Argument argument;
      if (k >= arguments.size() || arguments[k].is_none()) {
        TORCH_CHECK(schema[k].default_value(), name, ": argument ", k, " has no value.");
        argument.constant = *schema[k].default_value();
      } else if (py::isinstance<py::tuple>(arguments[k])) {
        const py::object inside = py::object(py::reinterpret_borrow<py::tuple>(arguments[k])[0]);
        argument.is_list = py::isinstance<py::list>(inside);
        if (argument.is_list) {
          argument.places = inside.cast<std::vector<int64_t>>();
          const auto type = schema[k].type()->cast<c10::ListType>();
          argument.is_optional_list = type && type->getElementType()->kind() == c10::TypeKind::OptionalType;
        } else {
          argument.places = {inside.cast<int64_t>()};
        }
      } else {
        argument.constant = constant_of(py::list(arguments[k])[0], schema[k].real_type());
      }
      call.arguments.push_back(std::move(argument));
    }
    calls_.push_back(std::move(call));
  }

  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs) const {
    TORCH_CHECK(inputs.size() == inputs_.size(), "this program takes ", inputs_.size(), " tensors, got ",
                inputs.size(), ".");
    at::AutoDispatchBelowAutograd below;
    c10::AutoGradMode training(true);  // oneDNN's recurrent layers keep what their backward pass needs only then
    std::vector<c10::IValue> values(places_);
    for (size_t k = 0; k < inputs.size(); ++k) values[inputs_[k]] = inputs[k];
    torch::jit::Stack stack;
    for (const Call& call : calls_) {
      for (const Argument& argument : call.arguments) push(stack, argument, values);
      call.op.callBoxed(stack);
      if (stack.size() == 1 && stack[0].isTensorList()) {
        const c10::List<at::Tensor> found = stack[0].toTensorList();
        for (int64_t k = 0; k < call.results; ++k) values[call.first_result + k] = found.get(k);
      } else {
        for (int64_t k = 0; k < call.results; ++k) values[call.first_result + k] = std::move(stack[k]);
      }
      stack.clear();
      for (const int64_t place : call.last_read) values[place] = c10::IValue();
    }
    std::vector<at::Tensor> outputs;
    for (const int64_t place : outputs_) outputs.push_back(values[place].toTensor());
    return outputs;
  }

 private:
  // A number in the place of a tensor becomes a tensor that does not take part in the promotion of types.
  static c10::IValue constant_of(const py::object& value, const c10::TypePtr& type) {
    const bool is_number = py::isinstance<py::int_>(value) || py::isinstance<py::float_>(value);
    if (type->kind() != c10::TypeKind::TensorType || !is_number) return torch::jit::toIValue(value, type);
    at::Tensor tensor = c10::scalar_to_tensor(torch::jit::toIValue(value, c10::NumberType::get()).toScalar());
    tensor.unsafeGetTensorImpl()->set_wrapped_number(true);
    return tensor;
  }

  static void push(torch::jit::Stack& stack, const Argument& argument, const std::vector<c10::IValue>& values) {
    if (argument.is_list && argument.is_optional_list) {
      c10::List<std::optional<at::Tensor>> list;
      for (const int64_t place : argument.places)
        list.push_back(place < 0 ? std::nullopt : std::optional<at::Tensor>(values[place].toTensor()));
      stack.emplace_back(std::move(list));
    } else if (argument.is_list) {
      c10::List<at::Tensor> list;
      for (const int64_t place : argument.places) list.push_back(values[place].toTensor());
      stack.emplace_back(std::move(list));
    } else if (!argument.places.empty()) {
      stack.push_back(values[argument.places[0]]);
    } else {
      stack.push_back(argument.constant);
    }
  }

  int64_t places_;
  std::vector<int64_t> inputs_, outputs_;
  std::vector<Call> calls_;
};

}  // namespace

void bind_program(py::module_& m) {
  py::class_<StraightLine>(m, "StraightLine", "Operators that are run one after another; see csrc/program.cpp.")
      .def(py::init<int64_t, std::vector<int64_t>, std::vector<int64_t>>())
      .def("add", &StraightLine::add)
      .def("run", &StraightLine::run, py::call_guard<py::gil_scoped_release>());
}

}  // namespace engm
