// The loops over the steps of recurrent layers, forwards and back: engm/rules/recurrence.py says what they compute. They
// are composed of ATen's operators, for every device, which modes and profilers see one by one; Python would take several
// times as long for each as a small one runs.
//
// n examples, T steps, H hidden features, P features of the hidden state (H without projections). Tensors by step are
// [n, T, ...]; a mask [n, T, 1] says which steps an example has: at others its state stays as it is.
#include "recurrence.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "checks.h"

namespace engm {

namespace {

namespace py = pybind11;

using Tensors = std::vector<at::Tensor>;

// Every step's part of a tensor by step, or nothing.
Tensors by_step(const at::Tensor& tensor) { return tensor.unbind(1); }
Tensors by_step(const OptionalTensor& tensor) { return tensor ? tensor->unbind(1) : Tensors(); }

// Calls `step(t, state)` for every step in order, which returns the state after it in memory of its own.
template <class Step>
Tensors forwards(int64_t length, bool reverse, const OptionalTensor& present, Tensors state, const Step& step) {
  const Tensors here = by_step(present);
  for (int64_t k = 0; k < length; ++k) {
    const int64_t t = reverse ? length - 1 - k : k;
    Tensors after = step(t, state);
    for (size_t part = 0; part < after.size() && present; ++part)
      after[part].copy_(at::where(here[t], after[part], state[part]));
    state = std::move(after);
  }
  return state;
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

// gates [n, T, 4 H] hold W_ih x + b_ih + b_hh and get the gates i, f and o (the third is left over); the new cell
// contents, cells and their tanh [n, T, H] and outputs [n, T, P] are written. Returns the last state.
Tensors run_lstm(const at::Tensor& gates, const at::Tensor& hh, const OptionalTensor& hr, const Tensors& state,
                 const OptionalTensor& present, bool reverse, const at::Tensor& outputs, const at::Tensor& contents,
                 const at::Tensor& cells, const at::Tensor& squashed, const OptionalTensor& unprojected) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Tensors each = by_step(gates), parts = gates.chunk(4, 2), enter = by_step(parts[0]), keep = by_step(parts[1]),
                cell = by_step(parts[2]), out = by_step(parts[3]);
  Tensors output = by_step(outputs), fresh = by_step(contents), after = by_step(cells), tanh = by_step(squashed),
          wide = by_step(hr ? *unprojected : outputs);
  const at::Tensor across = hh.t(), projection = hr ? hr->t() : at::Tensor();
  return forwards(each.size(), reverse, present, state, [&](int64_t t, const Tensors& before) -> Tensors {
    each[t].addmm_(before[0], across);
    at::tanh_out(fresh[t], cell[t]);
    each[t].sigmoid_();
    at::mul_out(after[t], keep[t], before[1]).addcmul_(enter[t], fresh[t]);
    at::tanh_out(tanh[t], after[t]);
    at::mul_out(wide[t], out[t], tanh[t]);
    if (hr) at::mm_out(output[t], wide[t], projection);
    return {output[t], after[t]};
  });
}

// Writes found [n, T, 4, H], and projected [n, T, P] where there are projections. `of_cell` is the derivative of the
// hidden state by the cell, by_cell [n, T, 3, H] and by_hidden are those of the pre-activations by cell and hidden state.
void back_lstm(const at::Tensor& of_cell, const at::Tensor& by_cell, const at::Tensor& by_hidden, const at::Tensor& forget,
               const at::Tensor& hh, const OptionalTensor& hr, const at::Tensor& found, const OptionalTensor& projected,
               const OptionalTensor& outputs, const Tensors& end, const OptionalTensor& present, bool reverse) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Tensors opens = by_step(of_cell), slopes = by_step(by_cell), slope = by_step(by_hidden), keep = by_step(forget),
                three = by_step(found.slice(2, 0, 3)), fourth = by_step(found.select(2, 3)), last = by_step(projected);
  const auto step = [&](int64_t t, const Tensors& after) -> Tensors {
    at::Tensor hidden = after[0];
    if (projected) {
      last[t].copy_(hidden);
      hidden = at::mm(hidden, *hr);
    }
    const at::Tensor cell = at::addcmul(after[1], hidden, opens[t]);
    at::Tensor inner = three[t], outer = fourth[t];
    at::mul_out(inner, slopes[t], cell.unsqueeze(1));
    at::mul_out(outer, slope[t], hidden);
    return {at::Tensor(), at::mul(cell, keep[t])};
  };
  backwards(reverse, present, outputs, hh, by_step(found.flatten(2)), end, step);
}

// gates [n, T, 3 H] hold W_ih x + b_ih and get the gates; from_hidden [n, T, H], W_hn h + b_hn, and outputs are written.
Tensors run_gru(const at::Tensor& gates, const at::Tensor& hh, const OptionalTensor& bias, const Tensors& state,
                const OptionalTensor& present, bool reverse, const at::Tensor& outputs, const at::Tensor& from_hidden) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t size = outputs.size(2);
  const Tensors parts = gates.chunk(3, 2), two = by_step(gates.slice(2, 0, 2 * size)), reset = by_step(parts[0]),
                update = by_step(parts[1]), third = by_step(parts[2]), inner = by_step(from_hidden);
  Tensors output = by_step(outputs);
  return forwards(output.size(), reverse, present, state, [&](int64_t t, const Tensors& before) -> Tensors {
    const at::Tensor found = at::linear(before[0], hh, bias);
    two[t].add_(found.slice(1, 0, 2 * size)).sigmoid_();
    inner[t].copy_(found.slice(1, 2 * size));
    third[t].addcmul_(reset[t], inner[t]).tanh_();
    return {at::lerp_out(output[t], third[t], before[0], update[t])};
  });
}

// Writes found [n, T, 3, H], and returns the gradients of the states after all steps, [n, T, H].
at::Tensor back_gru(const at::Tensor& by_hidden, const at::Tensor& updates, const at::Tensor& hh, const at::Tensor& found,
                    const OptionalTensor& outputs, const Tensors& end, const OptionalTensor& present, bool reverse) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Tensors slope = by_step(by_hidden), update = by_step(updates);
  Tensors into = by_step(found), arrived(into.size());
  const auto step = [&](int64_t t, const Tensors& after) -> Tensors {
    at::mul_out(into[t], slope[t], after[0].unsqueeze(1));
    arrived[t] = after[0];
    return {at::mul(after[0], update[t])};
  };
  backwards(reverse, present, outputs, hh, by_step(found.flatten(2)), end, step);
  return at::stack(arrived, 1);
}

// steps [n, T, H] hold W_ih x + b_ih + b_hh; outputs are written.
Tensors run_rnn(const at::Tensor& steps, const at::Tensor& hh, const Tensors& state, const OptionalTensor& present,
                bool reverse, const at::Tensor& outputs, bool relu) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::Tensor across = hh.t();
  const Tensors each = by_step(steps);
  Tensors output = by_step(outputs);
  return forwards(each.size(), reverse, present, state, [&](int64_t t, const Tensors& before) -> Tensors {
    at::addmm_out(output[t], each[t], before[0], across);
    return {relu ? output[t].relu_() : output[t].tanh_()};
  });
}

// Writes found [n, T, H]; slopes [n, T, H] are the derivatives of the states by the pre-activations.
void back_rnn(const at::Tensor& slopes, const at::Tensor& hh, const at::Tensor& found, const OptionalTensor& outputs,
              const Tensors& end, const OptionalTensor& present, bool reverse) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Tensors slope = by_step(slopes);
  Tensors into = by_step(found);
  const auto step = [&](int64_t t, const Tensors& after) -> Tensors {
    at::mul_out(into[t], slope[t], after[0]);
    return {at::Tensor()};
  };
  backwards(reverse, present, outputs, hh, into, end, step);
}

}  // namespace

void bind_recurrence(py::module_& m) {
  m.def("run_lstm", torch::wrap_pybind_function_no_gil(run_lstm));
  m.def("back_lstm", torch::wrap_pybind_function_no_gil(back_lstm));
  m.def("run_gru", torch::wrap_pybind_function_no_gil(run_gru));
  m.def("back_gru", torch::wrap_pybind_function_no_gil(back_gru));
  m.def("run_rnn", torch::wrap_pybind_function_no_gil(run_rnn));
  m.def("back_rnn", torch::wrap_pybind_function_no_gil(back_rnn));
}

}  // namespace engm
