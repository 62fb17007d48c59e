"""One recurrent layer in one direction: run step by step forwards, and back to the gradients of its pre-activations.

The terms of the parameters come from these. Each gate's derivative is known once the forward run is done, so it is
computed for all steps at once, and the backward run is one matrix product and a few products by element a step. The
rules of whole modules, which may have several layers and two directions, and of cells are in
:mod:`engm.rules.recurrent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..terms import LinearFactors, PerExampleGradient, Term, accumulation_dtype
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

        self.ih, self.hh = (module.get_parameter(f"weight_{part}{suffix}").detach().to(dtype) for part in ("ih", "hh"))
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
    """One layer in one direction, run forwards; subclasses say what a step does.

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
        length = inputs.shape[1]
        self._order = range(length - 1, -1, -1) if reverse else range(length)
        self._here = None if present is None else present.unsqueeze(2).unbind(1)
        self.outputs = inputs.new_empty(*inputs.shape[:2], state[0].shape[1])
        self._outputs = self.outputs.unbind(1)
        self.unprojected: Tensor | None = None
        self._back: Sequence[Tensor] = ()  # gradients of W_hh h_{t-1} + b_hh at each position
        self._nothing = torch.zeros_like(state[0])
        self._hh = weights.hh.t()
        self._prepare()
        for t in self._order:
            after = self._step(t, state)
            if self._here is not None:
                for new, old in zip(after, state, strict=True):
                    new.copy_(torch.where(self._here[t], new, old))
            state = after
        self.end = state
        self._derive()

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
        given = [bias for bias in biases if bias is not None]
        bias = torch.stack(given).sum(0) if given else None
        return nn.functional.linear(self.inputs, self.weights.ih, bias)

    def _prepare(self) -> None:
        """Compute what does not depend on states, and make room for the rest."""
        raise TypeError(f"{type(self).__name__} must define _prepare")

    def _step(self, t: int, state: State) -> State:
        """The state after step ``t``; its tensors are written into, and may be changed."""
        raise TypeError(f"{type(self).__name__} must define _step")

    def _derive(self) -> None:
        """Compute the derivatives that all backward steps use, and make room for the gradients."""
        raise TypeError(f"{type(self).__name__} must define _derive")

    def _step_back(self, t: int, *state: Tensor) -> list[Tensor]:
        """Write the gradients of a step's pre-activations; :attr:`_back` has them.

        Args:
            t: the position.
            *state: gradients of the state after the step; of a cell state without what comes through the hidden one.

        Returns:
            The gradients of the state before the step, of the hidden one without what comes through ``W_hh``.
        """
        raise TypeError(f"{type(self).__name__} must define _step_back")

    def _gradients(self) -> Gradients:
        """What :meth:`backpropagated` returns, after the last backward step."""
        raise TypeError(f"{type(self).__name__} must define _gradients")

    def backpropagated(self, outputs: Tensor | None, end: Sequence[Tensor | None]) -> Gradients:
        """Gradients of everything that the parameters' terms are made from; may be called once.

        Args:
            outputs: gradient of the outputs ``[n, T, H]``; None counts as zero.
            end: gradients of the last state, as many as an LSTM or another layer has; None counts as zero.
        """
        given = [None] * len(self._order) if outputs is None else outputs.unbind(1)
        state = [torch.zeros_like(s) if g is None else g for s, g in zip(self.first, end, strict=True)]
        later: int | None = None
        for t in reversed(self._order):
            if later is not None:
                state[0] = torch.addmm(state[0], self._back[later], self.weights.hh)
            later = t
            if (gradient := given[t]) is not None:
                state[0] = state[0] + gradient
            if self._here is None:
                state = self._step_back(t, *state)
            else:
                away = [g.masked_fill(self._here[t], 0) for g in state]
                before = self._step_back(t, *(g.masked_fill(~self._here[t], 0) for g in state))
                state = [a + b for a, b in zip(away, before, strict=True)]
        return self._gradients()


class _LSTM(LayerRun):
    """``i, f, o = sigmoid, g = tanh`` of the pre-activations; ``c' = f c + i g``; ``h' = o tanh(c')``."""

    def _prepare(self) -> None:
        gates = self._from_inputs(self.weights.bias_ih, self.weights.bias_hh)
        self._gates = gates.unflatten(2, (4, -1))
        self._steps = gates.unbind(1)
        shape = self._gates[:, :, 0].shape
        self._new, self._cells, self._tanh = (gates.new_empty(shape) for _ in range(3))
        self._enter, self._forget, self._cell, self._out = (gate.unbind(1) for gate in self._gates.unbind(2))
        self._each = [*zip(self._new.unbind(1), self._cells.unbind(1), self._tanh.unbind(1), strict=True)]
        if self.weights.hr is not None:
            self.unprojected = gates.new_empty(shape)
            self._unprojected = self.unprojected.unbind(1)

    def _step(self, t: int, state: State) -> State:
        hidden, cell = state
        new, after, squashed = self._each[t]
        self._steps[t].addmm_(hidden, self._hh)
        torch.tanh(self._cell[t], out=new)
        self._steps[t].sigmoid_()
        torch.mul(self._forget[t], cell, out=after)
        after.addcmul_(self._enter[t], new)
        torch.tanh(after, out=squashed)
        output = self._outputs[t]
        if self.weights.hr is None:
            torch.mul(self._out[t], squashed, out=output)
        else:
            torch.mul(self._out[t], squashed, out=self._unprojected[t])
            torch.mm(self._unprojected[t], self.weights.hr.t(), out=output)
        return output, after

    def _derive(self) -> None:
        enter, forget, _, out = self._gates.unbind(2)
        new, squashed = self._new, self._tanh
        before = self._before(self.first[1], self._cells)
        # Of the cell state by the hidden one; of the pre-activations by the cell state, that of o by the hidden one.
        self._of_cell = (out * (1 - squashed * squashed)).unbind(1)
        by_cell = torch.stack([new * enter * (1 - enter), before * forget * (1 - forget), enter * (1 - new * new)], 2)
        self._by_cell, self._by_hidden = by_cell.unbind(1), (squashed * out * (1 - out)).unbind(1)
        self._found = torch.empty_like(self._gates)
        self._of_three, self._of_out = self._found[:, :, :3].unbind(1), self._found[:, :, 3].unbind(1)
        self._back = self._found.flatten(2).unbind(1)
        self._projected = None if self.unprojected is None else torch.empty_like(self.outputs)

    def _step_back(self, t: int, *state: Tensor) -> list[Tensor]:
        hidden, cell = state
        if self._projected is not None and self.weights.hr is not None:
            self._projected[:, t] = hidden
            hidden = hidden @ self.weights.hr
        cell = torch.addcmul(cell, hidden, self._of_cell[t])
        torch.mul(self._by_cell[t], cell.unsqueeze(1), out=self._of_three[t])
        torch.mul(self._by_hidden[t], hidden, out=self._of_out[t])
        return [self._nothing, cell * self._forget[t]]

    def _gradients(self) -> Gradients:
        found = self._found.flatten(2)
        return Gradients(found, found, self._projected)


class _GRU(LayerRun):
    """``r, z = sigmoid`` of the pre-activations, ``new = tanh(P + r (W_hn h + b_hn))``; ``h' = new + z (h - new)``."""

    def _prepare(self) -> None:
        from_inputs = self._from_inputs(self.weights.bias_ih)
        self._gates = from_inputs.unflatten(2, (3, -1))
        self._two, self._third = self._gates[:, :, :2].flatten(2).unbind(1), self._gates[:, :, 2].unbind(1)
        self._reset, self._update = (gate.unbind(1) for gate in self._gates[:, :, :2].unbind(2))
        self._from_hidden = torch.empty_like(self._gates[:, :, 2])
        self._each = self._from_hidden.unbind(1)

    def _step(self, t: int, state: State) -> State:
        (hidden,) = state
        size = hidden.shape[1]
        found = nn.functional.linear(hidden, self.weights.hh, self.weights.bias_hh)
        self._two[t].add_(found[:, : 2 * size]).sigmoid_()
        self._each[t].copy_(found[:, 2 * size :])
        new = self._third[t].addcmul_(self._reset[t], self._each[t]).tanh_()
        return (torch.lerp(new, hidden, self._update[t], out=self._outputs[t]),)

    def _derive(self) -> None:
        reset, update, new = self._gates.unbind(2)
        of_new = (1 - update) * (1 - new * new)
        of_reset = of_new * self._from_hidden * reset * (1 - reset)
        of_update = (self.hidden - new) * update * (1 - update)
        self._of_new = of_new
        self._by_hidden = torch.stack([of_reset, of_update, of_new * reset], 2).unbind(1)
        self._found = torch.empty_like(self._gates)
        self._each_found, self._back = self._found.unbind(1), self._found.flatten(2).unbind(1)
        self._arrived: dict[int, Tensor] = {}

    def _step_back(self, t: int, *state: Tensor) -> list[Tensor]:
        (hidden,) = state
        torch.mul(self._by_hidden[t], hidden.unsqueeze(1), out=self._each_found[t])
        self._arrived[t] = hidden
        return [hidden * self._update[t]]

    def _gradients(self) -> Gradients:
        arrived = torch.stack([self._arrived[t] for t in range(len(self._order))], 1)
        from_inputs = torch.cat([self._found[:, :, :2].flatten(2), self._of_new * arrived], 2)
        return Gradients(from_inputs, self._found.flatten(2), None)


class _RNN(LayerRun):
    """``h' = tanh`` or ``relu`` of the pre-activations."""

    def _prepare(self) -> None:
        self._steps = self._from_inputs(self.weights.bias_ih, self.weights.bias_hh).unbind(1)

    def _step(self, t: int, state: State) -> State:
        return (self._squash(torch.addmm(self._steps[t], state[0], self._hh, out=self._outputs[t])),)

    @staticmethod
    def _squash(preactivations: Tensor) -> Tensor:
        return preactivations.tanh_()

    def _slopes(self) -> Tensor:
        return 1 - self.outputs * self.outputs

    def _derive(self) -> None:
        self._slope = self._slopes().unbind(1)
        self._found = torch.empty_like(self.outputs)
        self._back = self._found.unbind(1)

    def _step_back(self, t: int, *state: Tensor) -> list[Tensor]:
        torch.mul(state[0], self._slope[t], out=self._back[t])
        return [self._nothing]

    def _gradients(self) -> Gradients:
        return Gradients(self._found, self._found, None)


class _ReLU(_RNN):
    @staticmethod
    def _squash(preactivations: Tensor) -> Tensor:
        return preactivations.relu_()

    def _slopes(self) -> Tensor:
        return (self.outputs > 0).to(self.outputs.dtype)


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
    for name, gradient in ((f"bias_ih{suffix}", gradients.from_inputs), (f"bias_hh{suffix}", gradients.from_hidden)):
        if name in names:
            found[name] = PerExampleGradient(gradient.sum(1, dtype=accumulation_dtype(gradient)))
    return found
