// The steps of recurrent layers, forwards and back: engm/rules/recurrence.py says what they compute. Here they are
// composed of ATen's operators, for every device, which modes and profilers see one by one; Python would take several
// times as long for each as a small one runs. The CPU has loops of its own (cpu/recurrence.cpp).
//
// n examples, T steps, H hidden features, P features of the hidden state (H without projections). Tensors by step are
// [n, T, ...]; a mask [n, T, 1] says which steps an example has: at others its state stays as it is.
#include "recurrence.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gt.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

namespace engm {

namespace {

namespace py = pybind11;

using Tensors = std::vector<at::Tensor>;

// Every step's part of a tensor by step, or nothing.
Tensors by_step(const at::Tensor& tensor) { return tensor.unbind(1); }
Tensors by_step(const OptionalTensor& tensor) { return tensor ? tensor->unbind(1) : Tensors(); }

// Calls `step(t, state)` for every step in order, which returns the state after it in memory of its own.
template <class Step>
void forwards(int64_t length, bool reverse, const OptionalTensor& present, Tensors state, const Step& step) {
  const Tensors here = by_step(present);
  for (int64_t k = 0; k < length; ++k) {
    const int64_t t = reverse ? length - 1 - k : k;
    Tensors after = step(t, state);
    for (size_t part = 0; part < after.size() && present; ++part)
      after[part].copy_(at::where(here[t], after[part], state[part]));
    state = std::move(after);
  }
}

// Calls `step(t, gradients)` for every step from the last in order. It gets the gradients of the state after the step,
// writes those of W_hh h + b_hh into back[t], and returns those of the state before it, but for what goes through W_hh;
// that of the hidden state may be undefined, which is zero.
template <class Step>
void backwards(bool reverse, const OptionalTensor& present, const OptionalTensor& outputs, const at::Tensor& hh,
               const Tensors& back, Tensors gradients, const Step& step) {
  const Tensors here = by_step(present), given = by_step(outputs);
  const int64_t length = back.size();
  for (int64_t k = length - 1; k >= 0; --k) {
    const int64_t t = reverse ? length - 1 - k : k;
    at::Tensor& hidden = gradients[0];
    if (outputs) hidden = hidden.defined() ? at::add(hidden, given[t]) : given[t];
    if (k + 1 < length) {
      const at::Tensor& later = back[reverse ? t - 1 : t + 1];
      hidden = hidden.defined() ? at::addmm(hidden, later, hh) : at::mm(later, hh);
    }
    if (!present) {
      gradients = step(t, gradients);
      continue;
    }
    Tensors before;
    for (const auto& gradient : gradients) before.push_back(at::where(here[t], gradient, 0));
    before = step(t, before);
    for (size_t part = 0; part < gradients.size(); ++part) {
      const at::Tensor stayed = at::where(here[t], 0, gradients[part]);
      gradients[part] = before[part].defined() ? at::add(before[part], stayed) : stayed;
    }
  }
}

// The states before each step, [n, T, .], from the first one and those after each step.
at::Tensor before_each(const at::Tensor& first, const at::Tensor& states, bool reverse) {
  const at::Tensor one = first.unsqueeze(1);
  return reverse ? at::cat({states.slice(1, 1), one}, 1) : at::cat({one, states.slice(1, 0, -1)}, 1);
}

// The derivatives of tanh and of the sigmoid by their values.
at::Tensor of_tanh(const at::Tensor& value) { return at::rsub(at::mul(value, value), 1); }
at::Tensor of_sigmoid(const at::Tensor& value) { return at::mul(value, at::rsub(value, 1)); }

// Keeps the outputs [n, T, P], with projections the hidden states before them [n, T, H], then [n, T, 4 H] with the gates
// i, f and o (the third is left over), the cells, their tanh and the new contents of cells, each [n, T, H].
Tensors run_lstm(const at::Tensor& gates, const at::Tensor& hh, const OptionalTensor& hr, const Tensors& state,
                 const OptionalTensor& present, bool reverse) {
  const Tensors each = by_step(gates), parts = gates.chunk(4, 2), enter = by_step(parts[0]), keep = by_step(parts[1]),
                cell = by_step(parts[2]), out = by_step(parts[3]);
  Tensors kept{at::empty({gates.size(0), gates.size(1), hh.size(1)}, gates.options())};
  if (hr) kept.push_back(at::empty(parts[0].sizes(), gates.options()));
  const at::Tensor unprojected = kept.back();
  kept.push_back(gates);
  for (int k = 0; k < 3; ++k) kept.push_back(at::empty(parts[0].sizes(), gates.options()));
  Tensors output = by_step(kept[0]), wide = by_step(unprojected), after = by_step(kept.end()[-3]),
          tanh = by_step(kept.end()[-2]), fresh = by_step(kept.end()[-1]);
  const at::Tensor across = hh.t(), projection = hr ? hr->t() : at::Tensor();
  forwards(each.size(), reverse, present, state, [&](int64_t t, const Tensors& before) -> Tensors {
    each[t].addmm_(before[0], across);
    at::tanh_out(fresh[t], cell[t]);
    each[t].sigmoid_();
    at::mul_out(after[t], keep[t], before[1]).addcmul_(enter[t], fresh[t]);
    at::tanh_out(tanh[t], after[t]);
    at::mul_out(wide[t], out[t], tanh[t]);
    if (hr) at::mm_out(output[t], wide[t], projection);
    return {output[t], after[t]};
  });
  return kept;
}

Tensors back_lstm(at::TensorList kept, const at::Tensor& hh, const OptionalTensor& hr, at::TensorList state,
                  const OptionalTensor& outputs, const Tensors& end, const OptionalTensor& present, bool reverse) {
  const at::TensorList own = kept.slice(hr ? 2 : 1);
  const at::Tensor gates = own[0].unflatten(2, {4, -1}), cells = own[1], squashed = own[2], fresh = own[3];
  const Tensors slopes_of = of_sigmoid(gates).unbind(2), gate = gates.unbind(2);
  // Of the hidden state by the cell; of the pre-activations by the cell, and of the last by the hidden state.
  const Tensors opens = by_step(at::mul(gate[3], of_tanh(squashed))),
                slopes = by_step(at::stack({at::mul(fresh, slopes_of[0]),
                                            at::mul(before_each(state[1], cells, reverse), slopes_of[1]),
                                            at::mul(gate[0], of_tanh(fresh))}, 2)),
                slope = by_step(at::mul(squashed, slopes_of[3])), keep = by_step(gate[1]);
  const at::Tensor found = at::empty_like(gates);
  Tensors all{found.flatten(2)};
  if (hr) all.push_back(at::empty_like(kept[0]));
  const Tensors three = by_step(found.slice(2, 0, 3)), fourth = by_step(found.select(2, 3)), last = by_step(all.back());
  backwards(reverse, present, outputs, hh, by_step(all[0]), end, [&](int64_t t, const Tensors& after) -> Tensors {
    at::Tensor hidden = after[0];
    if (hr) {
      last[t].copy_(hidden);
      hidden = at::mm(hidden, *hr);
    }
    const at::Tensor cell = at::addcmul(after[1], hidden, opens[t]);
    at::Tensor inner = three[t], outer = fourth[t];
    at::mul_out(inner, slopes[t], cell.unsqueeze(1));
    at::mul_out(outer, slope[t], hidden);
    return {at::Tensor(), at::mul(cell, keep[t])};
  });
  return all;
}

// Keeps the outputs [n, T, H], the gates r, z and the new contents [n, T, 3 H], and W_hn h + b_hn [n, T, H].
Tensors run_gru(const at::Tensor& gates, const at::Tensor& hh, const OptionalTensor& bias, const Tensors& state,
                const OptionalTensor& present, bool reverse) {
  const int64_t size = hh.size(1);
  const Tensors parts = gates.chunk(3, 2), two = by_step(gates.slice(2, 0, 2 * size)), reset = by_step(parts[0]),
                update = by_step(parts[1]), third = by_step(parts[2]);
  const at::Tensor outputs = at::empty(parts[0].sizes(), gates.options()), from_hidden = at::empty_like(outputs);
  Tensors output = by_step(outputs), inner = by_step(from_hidden);
  forwards(output.size(), reverse, present, state, [&](int64_t t, const Tensors& before) -> Tensors {
    const at::Tensor found = at::linear(before[0], hh, bias);
    two[t].add_(found.slice(1, 0, 2 * size)).sigmoid_();
    inner[t].copy_(found.slice(1, 2 * size));
    third[t].addcmul_(reset[t], inner[t]).tanh_();
    return {at::lerp_out(output[t], third[t], before[0], update[t])};
  });
  return {outputs, gates, from_hidden};
}

Tensors back_gru(at::TensorList kept, const at::Tensor& hh, at::TensorList state, const OptionalTensor& outputs,
                 const Tensors& end, const OptionalTensor& present, bool reverse) {
  const Tensors gate = kept[1].chunk(3, 2), update = by_step(gate[1]);
  const at::Tensor of_update = at::mul(at::sub(before_each(state[0], kept[0], reverse), gate[2]), of_sigmoid(gate[1]));
  const at::Tensor of_new = at::mul(at::rsub(gate[1], 1), of_tanh(gate[2]));
  const at::Tensor of_reset = at::mul(at::mul(of_new, kept[2]), of_sigmoid(gate[0]));
  const Tensors slope = by_step(at::stack({of_reset, of_update, at::mul(of_new, gate[0])}, 2));
  const at::Tensor found = at::empty_like(kept[1]);
  Tensors into = by_step(found.unflatten(2, {3, -1})), arrived(into.size());
  backwards(reverse, present, outputs, hh, by_step(found), end, [&](int64_t t, const Tensors& after) -> Tensors {
    at::mul_out(into[t], slope[t], after[0].unsqueeze(1));
    arrived[t] = after[0];
    return {at::mul(after[0], update[t])};
  });
  const at::Tensor of_third = at::mul(of_new, at::stack(arrived, 1));
  return {found, at::cat({found.slice(2, 0, 2 * hh.size(1)), of_third}, 2)};
}

// Keeps the outputs [n, T, H].
Tensors run_rnn(const at::Tensor& steps, const at::Tensor& hh, const Tensors& state, const OptionalTensor& present,
                bool reverse, bool relu) {
  const at::Tensor across = hh.t(), outputs = at::empty_like(steps);
  const Tensors each = by_step(steps);
  Tensors output = by_step(outputs);
  forwards(each.size(), reverse, present, state, [&](int64_t t, const Tensors& before) -> Tensors {
    at::addmm_out(output[t], each[t], before[0], across);
    return {relu ? output[t].relu_() : output[t].tanh_()};
  });
  return {outputs};
}

Tensors back_rnn(const at::Tensor& states, const at::Tensor& hh, const OptionalTensor& outputs, const Tensors& end,
                 const OptionalTensor& present, bool reverse, bool relu) {
  const Tensors slope = by_step(relu ? at::gt(states, 0).to(states.scalar_type()) : of_tanh(states));
  const at::Tensor found = at::empty_like(states);
  Tensors into = by_step(found);
  backwards(reverse, present, outputs, hh, into, end, [&](int64_t t, const Tensors& after) -> Tensors {
    at::mul_out(into[t], slope[t], after[0]);
    return {at::Tensor()};
  });
  return {found};
}

OptionalTensor by_unit(const OptionalTensor& present) {
  return present ? OptionalTensor(present->unsqueeze(2)) : std::nullopt;
}

// Whether cpu/recurrence.cpp computes in the tensor's type.
bool has_loops(const at::Tensor& tensor) {
  return tensor.is_cpu() && (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble);
}

}  // namespace

cpu::Recurrent recurrent_kind(std::string_view name) {
  if (name == "LSTM") return cpu::Recurrent::kLstm;
  if (name == "GRU") return cpu::Recurrent::kGru;
  if (name == "RNN_TANH") return cpu::Recurrent::kRnnTanh;
  TORCH_CHECK(name == "RNN_RELU", "recurrence: expected \"LSTM\", \"GRU\", \"RNN_TANH\" or \"RNN_RELU\", got \"",
              name, "\".");
  return cpu::Recurrent::kRnnRelu;
}

at::Tensor from_inputs(cpu::Recurrent kind, const at::Tensor& inputs, const at::Tensor& ih, const at::Tensor& hh,
                       const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& hr,
                       at::TensorList state, const OptionalTensor& present) {
  const bool is_lstm = kind == cpu::Recurrent::kLstm, is_gru = kind == cpu::Recurrent::kGru;
  TORCH_CHECK(inputs.dim() == 3 && ih.dim() == 2 && hh.dim() == 2 && inputs.size(2) == ih.size(1) &&
                  ih.size(0) == hh.size(0),
              "recurrence: expected inputs [n, T, p], ih [gates H, p] and hh [gates H, P], got inputs ", inputs.sizes(),
              ", ih ", ih.sizes(), " and hh ", hh.sizes(), ".");
  const int64_t n = inputs.size(0), gates = is_lstm ? 4 : is_gru ? 3 : 1, size = ih.size(0) / gates;
  const bool projects = hr && is_lstm && hr->dim() == 2 && hr->size(0) == hh.size(1) && hr->size(1) == size;
  TORCH_CHECK(ih.size(0) == gates * size && (hr ? projects : hh.size(1) == size), "recurrence: expected ", gates,
              " gates, and hr [P, H] of an LSTM where P is not H, got ih ", ih.sizes(), ", hh ", hh.sizes(), " and hr ",
              hr ? hr->sizes() : at::IntArrayRef{}, ".");
  TORCH_CHECK(state.size() == (is_lstm ? 2 : 1) && state[0].dim() == 2 && state[0].size(0) == n &&
                  state[0].size(1) == hh.size(1) && state.back().size(0) == n && state.back().size(1) == size,
              "recurrence: expected the hidden state [n, P], and of an LSTM the cell [n, H], got ", state.size(),
              " tensors, the first ", state.empty() ? at::IntArrayRef{} : state[0].sizes(), ".");
  TORCH_CHECK(!present || (present->scalar_type() == at::kBool && present->sizes() == inputs.sizes().slice(0, 2)),
              "recurrence: expected bools [n, T] that say which steps there are, got ",
              present ? present->sizes() : at::IntArrayRef{}, ".");
  for (const OptionalTensor& bias : {bias_ih, bias_hh})
    TORCH_CHECK(!bias || bias->sizes() == ih.sizes().slice(0, 1), "recurrence: expected biases [", ih.size(0), "], got ",
                bias->sizes(), ".");
  const bool both = bias_ih && bias_hh && !is_gru;
  const OptionalTensor bias = both ? OptionalTensor(at::add(*bias_ih, *bias_hh)) : is_gru || bias_ih ? bias_ih : bias_hh;
  return at::linear(inputs, ih, bias).contiguous();
}

namespace aten {

Tensors recurrence(std::string_view name, const at::Tensor& inputs, const at::Tensor& ih, const at::Tensor& hh,
                   const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& hr,
                   at::TensorList state, const OptionalTensor& mask, bool reverse) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const cpu::Recurrent kind = recurrent_kind(name);
  const at::Tensor gates = from_inputs(kind, inputs, ih, hh, bias_ih, bias_hh, hr, state, mask);
  const OptionalTensor present = by_unit(mask);
  if (kind == cpu::Recurrent::kLstm) return run_lstm(gates, hh, hr, state.vec(), present, reverse);
  if (kind == cpu::Recurrent::kGru) return run_gru(gates, hh, bias_hh, state.vec(), present, reverse);
  return run_rnn(gates, hh, state.vec(), present, reverse, kind == cpu::Recurrent::kRnnRelu);
}

Tensors recurrence_back(std::string_view name, at::TensorList kept, const at::Tensor& hh, const OptionalTensor& hr,
                        at::TensorList state, const OptionalTensor& outputs, const OptionalTensor& hidden,
                        const OptionalTensor& cell, const OptionalTensor& mask, bool reverse) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const cpu::Recurrent kind = recurrent_kind(name);
  const OptionalTensor present = by_unit(mask);
  Tensors end;
  for (const at::Tensor& one : state) {
    const OptionalTensor& given = end.empty() ? hidden : cell;
    end.push_back(given ? *given : at::zeros_like(one));
  }
  if (kind == cpu::Recurrent::kLstm) return back_lstm(kept, hh, hr, state, outputs, end, present, reverse);
  if (kind == cpu::Recurrent::kGru) return back_gru(kept, hh, state, outputs, end, present, reverse);
  return back_rnn(kept[0], hh, outputs, end, present, reverse, kind == cpu::Recurrent::kRnnRelu);
}

}  // namespace aten

void bind_recurrence(py::module_& m) {
  const auto bind_run = [&m](const char* name, auto run) {
    m.def(name, torch::wrap_pybind_function_no_gil(
                    [run](std::string_view kind, const at::Tensor& inputs, const at::Tensor& ih, const at::Tensor& hh,
                          const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& hr,
                          const Tensors& state, const OptionalTensor& present, bool reverse) {
                      return run(kind, inputs, ih, hh, bias_ih, bias_hh, hr, state, present, reverse);
                    }));
  };
  const auto bind_back = [&m](const char* name, auto back) {
    m.def(name, torch::wrap_pybind_function_no_gil(
                    [back](std::string_view kind, const Tensors& kept, const at::Tensor& hh, const OptionalTensor& hr,
                           const Tensors& state, const OptionalTensor& outputs, const OptionalTensor& hidden,
                           const OptionalTensor& cell, const OptionalTensor& present, bool reverse) {
                      return back(kind, kept, hh, hr, state, outputs, hidden, cell, present, reverse);
                    }));
  };
  auto& dispatcher = c10::Dispatcher::singleton();
  const auto run = dispatcher.findSchemaOrThrow("engm::recurrence", "").typed<decltype(cpu::recurrence)>();
  const auto back = dispatcher.findSchemaOrThrow("engm::recurrence_back", "").typed<decltype(cpu::recurrence_back)>();
  // On the CPU one operator, elsewhere ATen's, which a compiler of graphs may fuse.
  bind_run("recurrence", [run](std::string_view kind, const at::Tensor& inputs, const auto&... others) {
    return has_loops(inputs) ? run.call(kind, inputs, others...) : aten::recurrence(kind, inputs, others...);
  });
  bind_back("recurrence_back", [back](std::string_view kind, const Tensors& kept, const auto&... others) {
    return has_loops(kept.at(0)) ? back.call(kind, kept, others...) : aten::recurrence_back(kind, kept, others...);
  });
  bind_run("recurrence_of_aten", &aten::recurrence);
  bind_back("recurrence_back_of_aten", &aten::recurrence_back);
}

}  // namespace engm
