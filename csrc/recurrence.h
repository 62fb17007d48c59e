// Declares what the two forms of a recurrent layer's steps share (recurrence.cpp and cpu/recurrence.cpp), and their
// binding to Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <string_view>

#include "cpu/kernels.h"
#include "ops.h"

namespace engm {

// The kind of layer by torch's name of it: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
cpu::Recurrent recurrent_kind(std::string_view name);

// Checks the operands of a layer, and forms what of all gates [n, T, gates H] comes from the inputs and the biases, but of a
// GRU that with W_hh h; contiguous, in memory of its own.
at::Tensor from_inputs(cpu::Recurrent kind, const at::Tensor& inputs, const at::Tensor& ih, const at::Tensor& hh,
                       const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& hr,
                       at::TensorList state, const OptionalTensor& present);

void bind_recurrence(pybind11::module_& m);

}  // namespace engm
