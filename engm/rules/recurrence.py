"""One recurrent layer in one direction: run step by step forwards, and back to the gradients of its pre-activations.

The terms of the parameters come from these. Each gate's derivative is known once the forward run is done, so it is
computed for all steps at once, and the backward run is one matrix product and a few products by element a step. What is
done step by step is compiled (csrc/recurrence.cpp), of the same operators. The rules of whole modules, which may have
several layers and two directions, and of cells are in :mod:`engm.rules.recurrent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .._C import back_gru, back_lstm, back_rnn, run_gru, run_lstm, run_rnn
from ..terms import LinearFactors, PerExampleGradient, Term
from ..torch_internals import own_parameters

State = tuple[Tensor, ...]
"""The hidden state ``[n, H]`` (``[n, P]`` with projections), and of an LSTM the cell state ``[n, H]`` too."""


class Weights:
    """The parameters of one layer and direction, in the dtype that is computed in.

    Args:
        module: the recurrent module or cell.
        suffix: what the parameters' names end in, for example ``"_l0_reverse"``; of a cell ``""``.
        dtype: the dtype to compute in.
    """

    def __init__(self, module: nn.Module, suffix: str, dtype: torch.dtype) -> None:
        def get(name: str) -> Tensor | None:
            parameter = own_parameters(module).get(name + suffix)
            return None if parameter is None else parameter.detach().to(dtype)

        self.ih, self.hh = (getattr(module, f"weight_{part}{suffix}").detach().to(dtype) for part in ("ih", "hh"))
        self.bias_ih, self.bias_hh, self.hr = get("bias_ih"), get("bias_hh"), get("weight_hr")


class Gradients(NamedTuple):
    """Gradients of what a run computed.

    Attributes:
        from_inputs: of ``W_ih x_t + b_ih``, ``[n, T, gates * H]``.
        from_hidden: of ``W_hh h_{t-1} + b_hh``, shaped alike; the same tensor where only the sum of the two is read.
        projected: of an LSTM with projections, of the new hidden states ``[n, T, P]``.
    """

    from_inputs: Tensor
    from_hidden: Tensor
    projected: Tensor | None


class LayerRun:
    """One layer in one direction, run forwards; subclasses say how.

    Args:
        weights: the layer's parameters.
        inputs: ``[n, T, p]``.
        state: the initial state.
        reverse: whether positions are read from the last to the first.
        present: ``[n, T]``, which positions exist; at others an example's state stays as it is. None: all exist.

    Attributes:
        outputs: the hidden states, ``[n, T, H]``.
        end: the last state.
        unprojected: of an LSTM with projections, the new hidden states before their projection, ``[n, T, H]``.
    """

    def __init__(
        self,
        weights: Weights,
        inputs: Tensor,
        state: State,
        *,
        reverse: bool = False,
        present: Tensor | None = None,
    ) -> None:
        self.weights = weights
        self.inputs = inputs
        self.first = state
        self.reverse = reverse
        self._present = None if present is None else present.unsqueeze(2)
        self.outputs = inputs.new_empty(*inputs.shape[:2], state[0].shape[1])
        self.unprojected: Tensor | None = None
        self.end = tuple(self._run())

    @property
    def hidden(self) -> Tensor:
        """The hidden state before each step, ``[n, T, H]``."""
        return self._before(self.first[0], self.outputs)

    def _before(self, first: Tensor, states: Tensor) -> Tensor:
        """The states before each step, from the first one and those after each step."""
        first = first.unsqueeze(1)
        return torch.cat([states[:, 1:], first] if self.reverse else [first, states[:, :-1]], 1)

    def _from_inputs(self, *biases: Tensor | None) -> Tensor:
        """``W_ih x_t`` of all steps and these biases, ``[n, T, gates * H]``."""
        bias: Tensor | None = None
        for given in biases:
            bias = given if bias is None else bias if given is None else bias + given
        return nn.functional.linear(self.inputs, self.weights.ih, bias)

    def _run(self) -> Sequence[Tensor]:
        """Run all steps, write :attr:`outputs`, and return the last state."""
        raise TypeError(f"{type(self).__name__} must define _run")

    def _back(self, outputs: Tensor | None, end: Sequence[Tensor]) -> Gradients:
        """What :meth:`backpropagated` returns.

        Args:
            outputs: gradient of the outputs.
            end: gradients of the last state.
        """
        raise TypeError(f"{type(self).__name__} must define _back")

    def backpropagated(self, outputs: Tensor | None, end: Sequence[Tensor | None]) -> Gradients:
        """Gradients of everything that the parameters' terms are made from; may be called once.

        Args:
            outputs: gradient of the outputs ``[n, T, H]``; None counts as zero.
            end: gradients of the last state, as many as an LSTM or another layer has; None counts as zero.
        """
        given = [torch.zeros_like(s) if g is None else g for s, g in zip(self.first, end, strict=True)]
        return self._back(outputs, given)


class _LSTM(LayerRun):
    """``i, f, o = sigmoid, g = tanh`` of the pre-activations; ``c' = f c + i g``; ``h' = o tanh(c')``."""

    def _run(self) -> Sequence[Tensor]:
        weights = self.weights
        gates = self._from_inputs(weights.bias_ih, weights.bias_hh)
        self._gates = gates.unflatten(2, (4, -1))
        shape = self._gates[:, :, 0].shape
        self._new, self._cells, self._tanh = (gates.new_empty(shape) for _ in range(3))
        if weights.hr is not None:
            self.unprojected = gates.new_empty(shape)
        made = (self.outputs, self._new, self._cells, self._tanh, self.unprojected)
        return run_lstm(gates, weights.hh, weights.hr, list(self.first), self._present, self.reverse, *made)

    def _back(self, outputs: Tensor | None, end: Sequence[Tensor]) -> Gradients:
        gates, new, squashed = self._gates, self._new, self._tanh
        enter, forget, _, out = gates.unbind(2)
        of_enter, of_forget, _, of_out = (gates * (1 - gates)).unbind(2)  # derivatives of the sigmoids
        before = self._before(self.first[1], self._cells)
        # Of the cell state by the hidden one; of the pre-activations by the cell state, that of o by the hidden one.
        of_cell = out * (1 - squashed * squashed)
        by_cell = torch.stack([new * of_enter, before * of_forget, enter * (1 - new * new)], 2)
        by_hidden = squashed * of_out
        found = torch.empty_like(self._gates)
        projected = None if self.unprojected is None else torch.empty_like(self.outputs)
        derivatives = (of_cell, by_cell, by_hidden, forget, self.weights.hh, self.weights.hr)
        back_lstm(*derivatives, found, projected, outputs, list(end), self._present, self.reverse)
        found = found.flatten(2)
        return Gradients(found, found, projected)


class _GRU(LayerRun):
    """``r, z = sigmoid`` of the pre-activations, ``new = tanh(P + r (W_hn h + b_hn))``; ``h' = new + z (h - new)``."""

    def _run(self) -> Sequence[Tensor]:
        weights = self.weights
        gates = self._from_inputs(weights.bias_ih)
        self._gates = gates.unflatten(2, (3, -1))
        self._from_hidden = torch.empty_like(self._gates[:, :, 2])
        made = (self.outputs, self._from_hidden)
        return run_gru(gates, weights.hh, weights.bias_hh, list(self.first), self._present, self.reverse, *made)

    def _back(self, outputs: Tensor | None, end: Sequence[Tensor]) -> Gradients:
        reset, update, new = self._gates.unbind(2)
        of_new = (1 - update) * (1 - new * new)
        of_reset = of_new * self._from_hidden * reset * (1 - reset)
        of_update = (self.hidden - new) * update * (1 - update)
        by_hidden = torch.stack([of_reset, of_update, of_new * reset], 2)
        found = torch.empty_like(self._gates)
        how = (self._present, self.reverse)
        arrived = back_gru(by_hidden, update, self.weights.hh, found, outputs, list(end), *how)
        from_inputs = torch.cat([found[:, :, :2].flatten(2), of_new * arrived], 2)
        return Gradients(from_inputs, found.flatten(2), None)


class _RNN(LayerRun):
    """``h' = tanh`` or ``relu`` of the pre-activations."""

    relu = False

    def _run(self) -> Sequence[Tensor]:
        weights = self.weights
        steps = self._from_inputs(weights.bias_ih, weights.bias_hh)
        return run_rnn(steps, weights.hh, list(self.first), self._present, self.reverse, self.outputs, self.relu)

    def _back(self, outputs: Tensor | None, end: Sequence[Tensor]) -> Gradients:
        states = self.outputs
        slopes = (states > 0).to(states.dtype) if self.relu else 1 - states * states
        found = torch.empty_like(states)
        back_rnn(slopes, self.weights.hh, found, outputs, list(end), self._present, self.reverse)
        return Gradients(found, found, None)


class _ReLU(_RNN):
    relu = True


RUNS: dict[str, type[LayerRun]] = {"LSTM": _LSTM, "GRU": _GRU, "RNN_TANH": _RNN, "RNN_RELU": _ReLU}
"""By the module's ``mode``."""


def layer_terms(run: LayerRun, gradients: Gradients, suffix: str, names: tuple[str, ...]) -> dict[str, Term]:
    """Terms of the parameters of one layer and direction.

    Args:
        run: the layer's run.
        gradients: from :meth:`LayerRun.backpropagated`.
        suffix: what the parameters' names end in.
        names: the parameters that are wanted.
    """
    found: dict[str, Term] = {}
    if f"weight_ih{suffix}" in names:
        found[f"weight_ih{suffix}"] = LinearFactors(run.inputs, gradients.from_inputs)
    if f"weight_hh{suffix}" in names:
        found[f"weight_hh{suffix}"] = LinearFactors(run.hidden, gradients.from_hidden)
    if f"weight_hr{suffix}" in names and run.unprojected is not None and gradients.projected is not None:
        found[f"weight_hr{suffix}"] = LinearFactors(run.unprojected, gradients.projected)
    sums = {}  # by the gradient (id), which both biases may have in common
    for name, gradient in ((f"bias_ih{suffix}", gradients.from_inputs), (f"bias_hh{suffix}", gradients.from_hidden)):
        if name in names:
            if id(gradient) not in sums:
                sums[id(gradient)] = ops.position_sums(gradient, 1)
            norm_sq, summed = sums[id(gradient)]
            found[name] = PerExampleGradient(summed, norm_sq)
    return found
