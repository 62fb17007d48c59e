"""One recurrent layer in one direction: run step by step forwards, and back to the gradients of its pre-activations.

The terms of the parameters come from these. Both runs are compiled (csrc/recurrence.cpp, and for the CPU
csrc/cpu/recurrence.cpp). The rules of whole modules, which may have several layers and two directions, and of cells are
in :mod:`engm.rules.recurrent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
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
    """One layer in one direction, run forwards.

    The kinds of layers: an LSTM has ``i, f, o = sigmoid, g = tanh`` of the pre-activations, ``c' = f c + i g`` and
    ``h' = o tanh(c')``; a GRU ``r, z = sigmoid`` of them, ``new = tanh(P + r (W_hn h + b_hn))`` and
    ``h' = new + z (h - new)``; an RNN ``h' = tanh`` or ``relu`` of them.

    Args:
        kind: the ``mode`` of the module, ``"LSTM"``, ``"GRU"``, ``"RNN_TANH"`` or ``"RNN_RELU"``.
        weights: the layer's parameters.
        inputs: ``[n, T, p]``.
        state: the initial state.
        reverse: whether positions are read from the last to the first.
        present: ``[n, T]``, which positions exist; at others an example's state stays as it is. None: all exist.

    Attributes:
        outputs: the hidden states, ``[n, T, H]`` (``[n, T, P]`` with projections).
        unprojected: of an LSTM with projections, the new hidden states before their projection, ``[n, T, H]``.
    """

    def __init__(
        self,
        kind: str,
        weights: Weights,
        inputs: Tensor,
        state: State,
        *,
        reverse: bool = False,
        present: Tensor | None = None,
    ) -> None:
        self.kind = kind
        self.weights = weights
        self.inputs = inputs
        self.first = state
        self.reverse = reverse
        self._present = present
        matrices = (weights.ih, weights.hh, weights.bias_ih, weights.bias_hh, weights.hr)
        self._kept = ops.recurrence(kind, inputs, *matrices, self.first, present, reverse)
        self.outputs = self._kept[0]
        self.unprojected = None if weights.hr is None else self._kept[1]

    @property
    def hidden(self) -> Tensor:
        """The hidden state before each step, ``[n, T, H]``."""
        first = self.first[0].unsqueeze(1)
        return torch.cat([self.outputs[:, 1:], first] if self.reverse else [first, self.outputs[:, :-1]], 1)

    @property
    def end(self) -> Tensor:
        """The last hidden state, ``[n, H]``."""
        return self.outputs[:, 0 if self.reverse else -1]

    def backpropagated(self, outputs: Tensor | None, end: Sequence[Tensor | None]) -> Gradients:
        """Gradients of everything that the parameters' terms are made from.

        Args:
            outputs: gradient of the outputs ``[n, T, H]``; None counts as zero.
            end: gradients of the last state, as many as an LSTM or another layer has; None counts as zero.
        """
        weights, (hidden, cell) = self.weights, (*end, None)[:2]
        how = (self._present, self.reverse)
        found = ops.recurrence_back(
            self.kind, self._kept, weights.hh, weights.hr, self.first, outputs, hidden, cell, *how
        )
        from_inputs = found[1] if self.kind == "GRU" else found[0]
        return Gradients(from_inputs, found[0], None if weights.hr is None else found[1])


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
