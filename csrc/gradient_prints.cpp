// Looks at the gradients of a backward pass by which the owners of rows are told (engm/graph/owners.py): hooks on nodes
// that keep a print of what arrives there. A graph has hundreds of nodes, and in Python each look takes longer than
// what the node itself computes.
#include "gradient_prints.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/bitwise_right_shift.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/view_as_real.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "held_object.h"
#include "node_of.h"

namespace engm {

namespace {

namespace py = pybind11;
using torch::autograd::FunctionPostHook;
using torch::autograd::FunctionPreHook;
using torch::autograd::variable_list;

// What is kept of a gradient: the shape by which rows are told apart, two random projections of every row (of a row of
// one number that number), the type that the gradient had, and exponents if they are asked for (see exponents_of).
struct Print {
  std::vector<int64_t> shape;
  at::Tensor marks;
  at::ScalarType type;
  at::Tensor exponents;
};

// How numbers of a type hold their exponent: above so many bits of the mantissa, in so many bits. And by how much the
// exponent of an element may be below the largest of its row to count.
template <typename scalar_t>
struct Exponent;
template <>
struct Exponent<float> {
  using Bits = int32_t;
  static constexpr int mantissa = 23, mask = 0xff, reach = 60;
};
template <>
struct Exponent<double> {
  using Bits = int64_t;
  static constexpr int mantissa = 52, mask = 0x7ff, reach = 200;
};

// A number for every place in a row, int32 [width], on the CPU: odd, up to 63, and in no order.
at::Tensor numbers_of_places(int64_t width) {
  at::Tensor numbers = at::empty({width}, at::TensorOptions(at::kInt).device(at::kCPU));
  auto* const number = numbers.mutable_data_ptr<int32_t>();
  for (int64_t place = 0; place < width; ++place)
    number[place] = static_cast<int32_t>((((place + 1) * 2654435761) >> 20) & 0x3f) | 1;
  return numbers;
}

// The two sums of exponents_of over one row, whose elements are given as bits.
template <typename scalar_t>
[[gnu::always_inline]] inline void sum_row(const typename Exponent<scalar_t>::Bits* bits, const int32_t* numbers,
                                           int64_t width, int64_t* found) {
  using Of = Exponent<scalar_t>;
  constexpr int64_t kAtOnce = 1 << 14;  // elements whose sum fits into 32 bits
  int32_t largest = 0;
  for (int64_t k = 0; k < width; ++k)
    largest = std::max(largest, static_cast<int32_t>((bits[k] >> Of::mantissa) & Of::mask));
  const int32_t lowest = largest - Of::reach;
  found[0] = found[1] = 0;
  if (lowest <= 0) return;
  for (int64_t first = 0; first < width; first += kAtOnce) {
    const int64_t end = std::min(width, first + kAtOnce);
    int32_t sum = 0, counted = 0;
    for (int64_t k = first; k < end; ++k) {
      const auto exponent = static_cast<int32_t>((bits[k] >> Of::mantissa) & Of::mask);
      const int32_t number = exponent > lowest ? numbers[k] : 0;
      sum += number * exponent;
      counted += number;
    }
    found[0] += sum;
    found[1] += counted;
  }
}

// Compiled for the vectors of several processors, of which the loader takes the best.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ENGM_FOR_EACH_CPU [[gnu::target_clones("avx512f", "avx2", "default")]]
#else
#define ENGM_FOR_EACH_CPU
#endif
ENGM_FOR_EACH_CPU void sums_of_row(const int32_t* bits, const int32_t* numbers, int64_t width, int64_t* found) {
  sum_row<float>(bits, numbers, width, found);
}
ENGM_FOR_EACH_CPU void sums_of_row(const int64_t* bits, const int32_t* numbers, int64_t width, int64_t* found) {
  sum_row<double>(bits, numbers, width, found);
}
#undef ENGM_FOR_EACH_CPU

// Of every row the sum of the exponents of its elements, and how many there are, both with a number for every place as
// weights: int64 [rows, 2]. If a row is multiplied by a power of two, the exponent of that times the second is added to
// the first, exactly; of elements that are multiplied by another it is not, however small they are beside the others.
// What is much smaller than the largest element does not count, and nothing does in a row in which that may be no normal
// number.
at::Tensor exponents_of(const at::Tensor& rows) {
  const int64_t count = rows.size(0), width = rows.size(1);
  return AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "exponents_of", [&] {
    using Of = Exponent<scalar_t>;
    using Bits = typename Of::Bits;
    if (!rows.is_cpu()) {
      const at::Tensor bits = rows.contiguous().view(c10::CppTypeToScalarType<Bits>::value);
      const at::Tensor exponents = at::bitwise_and(at::bitwise_right_shift(bits, Of::mantissa), Of::mask);
      const at::Tensor lowest = at::amax(exponents, 1, true) - Of::reach;
      const at::Tensor counted = at::logical_and(exponents > lowest, lowest > 0);
      const at::Tensor weights = numbers_of_places(width).to(rows.device()) * counted;
      return at::stack({(exponents * weights).sum(1), weights.sum(1)}, 1);
    }
    const at::Tensor given = rows.contiguous(), numbers = numbers_of_places(width);
    const at::Tensor found = at::empty({count, 2}, numbers.options().dtype(at::kLong));
    const auto* const number_of = numbers.const_data_ptr<int32_t>();
    const auto* const elements = reinterpret_cast<const Bits*>(given.const_data_ptr<scalar_t>());
    auto* const sums = found.mutable_data_ptr<int64_t>();
    at::parallel_for(0, count, std::max<int64_t>(1, (1 << 15) / width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        sums_of_row(elements + row * width, number_of, width, sums + 2 * row);
    });
    return found;
  });
}

// Prints of gradients, by numbers that the caller gave them. Threads of one backward pass may look at the same time.
class GradientPrints {
 public:
  // by_element   tell every element apart, and not the vectors along the last dimension
  // directions   gives the directions [width, 2] to project on, for a width, a type and a device
  // dense        gives the same numbers one behind the other, for a gradient of another layout
  // exponents    keep those too, of rows of several numbers
  GradientPrints(bool by_element, py::object directions, py::object dense, bool exponents)
      : by_element_(by_element),
        exponents_(exponents),
        directions_of_(std::move(directions)),
        dense_(std::move(dense)) {}

  // Takes the print of a gradient; of none if there is none.
  void take(int64_t number, const at::Tensor& gradient) {
    if (!gradient.defined()) return;
    Print print = of(gradient);
    const std::lock_guard<std::mutex> one_at_a_time(lock_);
    taken_.emplace_back(number, std::move(print));
  }

  // (number, shape, marks, type of the gradient, exponents) of all that was taken, in order; nothing is kept.
  std::vector<py::tuple> taken() {
    std::vector<py::tuple> found;
    for (auto& [number, print] : std::exchange(taken_, {})) {
      py::tuple shape(print.shape.size());
      for (size_t d = 0; d < print.shape.size(); ++d) shape[d] = py::int_(print.shape[d]);
      found.push_back(py::make_tuple(number, std::move(shape), std::move(print.marks), print.type,
                                     std::move(print.exponents)));
    }
    return found;
  }

 private:
  Print of(const at::Tensor& given) {
    const at::NoGradGuard without_graph;
    // Products are of the type of their operands, whatever the caller's autocast.
    const c10::impl::ExcludeDispatchKeyGuard as_they_are(c10::autocast_dispatch_keyset);
    const bool usual = given.layout() == at::kStrided && !given.is_nested();
    at::Tensor gradient = usual ? given.detach() : made_dense(given);
    const at::ScalarType type = gradient.scalar_type();
    int64_t trailing = by_element_ || gradient.dim() < 2 ? 0 : 1;
    if (gradient.is_complex()) {
      trailing = by_element_ || gradient.dim() < 2 ? 1 : 2;
      gradient = at::view_as_real(gradient.resolve_conj());
    }
    std::vector<int64_t> shape = gradient.sizes().slice(0, gradient.dim() - trailing).vec();
    const int64_t rows = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    const at::ScalarType precise = gradient.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    if (gradient.numel() == 0)
      return {std::move(shape), at::zeros({rows, 1}, gradient.options().dtype(precise)), type, {}};
    at::Tensor marks = gradient.reshape({rows, -1}).to(precise), exponents;
    if (marks.size(1) > 1) {
      if (exponents_) exponents = exponents_of(marks);
      marks = at::mm(marks, directions(marks));
    }
    return {std::move(shape), std::move(marks), type, std::move(exponents)};
  }

  at::Tensor made_dense(const at::Tensor& given) {
    const py::gil_scoped_acquire locked;
    return py::reinterpret_borrow<py::object>(dense_.get())(given).cast<at::Tensor>();
  }

  at::Tensor directions(const at::Tensor& rows) {
    const auto key = std::make_tuple(rows.size(1), rows.scalar_type(), rows.device().index());
    {
      const std::lock_guard<std::mutex> one_at_a_time(lock_);
      if (const auto found = directions_.find(key); found != directions_.end()) return found->second;
    }
    at::Tensor drawn;
    {
      const py::gil_scoped_acquire locked;
      const auto draw = py::reinterpret_borrow<py::object>(directions_of_.get());
      drawn = draw(rows.size(1), rows.scalar_type(), rows.device()).cast<at::Tensor>();
    }
    const std::lock_guard<std::mutex> one_at_a_time(lock_);
    return directions_.emplace(key, std::move(drawn)).first->second;
  }

  const bool by_element_, exponents_;
  const HeldObject directions_of_, dense_;
  std::mutex lock_;
  std::map<std::tuple<int64_t, at::ScalarType, c10::DeviceIndex>, at::Tensor> directions_;
  std::vector<std::pair<int64_t, Print>> taken_;
};

using Numbered = std::vector<std::pair<size_t, int64_t>>;  // which gradient of a node, and the number of its print

// Takes the prints of some of the gradients that a node gets or passes on.
void take_some(GradientPrints& prints, const Numbered& numbers, const variable_list& gradients) {
  for (const auto& [which, number] : numbers) prints.take(number, gradients.at(which));
}

// The same as a function of Python, which gets the gradients last, for torch's compiled autograd
// (torch._dynamo.config.compiled_autograd).
c10::SafePyObject as_function(const std::shared_ptr<GradientPrints>& prints, const Numbered& numbers) {
  const auto take = [prints, numbers](const py::sequence& gradients) {
    for (const auto& [which, number] : numbers)
      if (const py::object gradient = gradients[which]; !gradient.is_none())
        prints->take(number, gradient.cast<at::Tensor>());
  };
  py::cpp_function hook([take](const py::args& gradients) { take(gradients[0].cast<py::sequence>()); });
  return c10::SafePyObject(hook.release().ptr(), getPyInterpreter());
}

class OutputHook : public FunctionPreHook {
 public:
  OutputHook(std::shared_ptr<GradientPrints> prints, Numbered numbers)
      : prints_(std::move(prints)), numbers_(std::move(numbers)) {}

  variable_list operator()(const variable_list& gradients) override {
    take_some(*prints_, numbers_, gradients);
    return gradients;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    const py::gil_scoped_acquire locked;
    args.add_pre_hook(as_function(prints_, numbers_));
  }

 private:
  std::shared_ptr<GradientPrints> prints_;
  Numbered numbers_;
};

class InputHook : public FunctionPostHook {
 public:
  InputHook(std::shared_ptr<GradientPrints> prints, Numbered numbers)
      : prints_(std::move(prints)), numbers_(std::move(numbers)) {}

  variable_list operator()(const variable_list& passed_on, const variable_list&) override {
    take_some(*prints_, numbers_, passed_on);
    return passed_on;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    const py::gil_scoped_acquire locked;
    args.add_post_hook(as_function(prints_, numbers_));
  }

 private:
  std::shared_ptr<GradientPrints> prints_;
  Numbered numbers_;
};

// The hooks on some nodes, until they are taken off.
class PrintHooks {
 public:
  explicit PrintHooks(std::shared_ptr<GradientPrints> prints) : prints_(std::move(prints)) {}

  // Takes the prints of the gradients of a node's outputs. `numbers`: (which output, number of its print).
  void watch_outputs(py::handle node, Numbered numbers) {
    auto hook = std::make_unique<OutputHook>(prints_, std::move(numbers));
    before_.emplace_back(node_of(node), hook.get());
    before_.back().first->add_pre_hook(std::move(hook));
  }

  // Takes the prints of the gradients that a node passes on. `numbers`: (which input, number of its print).
  void watch_inputs(py::handle node, Numbered numbers) {
    auto hook = std::make_unique<InputHook>(prints_, std::move(numbers));
    const auto key = reinterpret_cast<std::uintptr_t>(hook.get());
    after_.emplace_back(node_of(node), key);
    after_.back().first->add_post_hook(std::move(hook));
  }

  void remove() {
    for (const auto& [node, ours] : before_) {
      auto& hooks = node->pre_hooks();
      const auto is_ours = [ours = ours](const auto& hook) { return hook.get() == ours; };
      hooks.erase(std::remove_if(hooks.begin(), hooks.end(), is_ours), hooks.end());
    }
    for (const auto& [node, key] : after_) node->del_post_hook(key);
    before_.clear();
    after_.clear();
  }

 private:
  std::shared_ptr<GradientPrints> prints_;
  std::vector<std::pair<NodePointer, const FunctionPreHook*>> before_;
  std::vector<std::pair<NodePointer, std::uintptr_t>> after_;
};

}  // namespace

void bind_gradient_prints(py::module_& m) {
  py::class_<GradientPrints, std::shared_ptr<GradientPrints>>(m, "GradientPrints")
      .def(py::init<bool, py::object, py::object, bool>(), py::arg("by_element"), py::arg("directions"),
           py::arg("dense"), py::arg("exponents") = false)
      .def("take", &GradientPrints::take, py::arg("number"), py::arg("gradient"),
           py::call_guard<py::gil_scoped_release>())
      .def("taken", &GradientPrints::taken);
  py::class_<PrintHooks>(m, "PrintHooks")
      .def(py::init<std::shared_ptr<GradientPrints>>(), py::arg("prints"))
      .def("watch_outputs", &PrintHooks::watch_outputs, py::arg("node"), py::arg("numbers"))
      .def("watch_inputs", &PrintHooks::watch_inputs, py::arg("node"), py::arg("numbers"))
      .def("remove", &PrintHooks::remove);
}

}  // namespace engm
