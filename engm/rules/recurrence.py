"""How one recurrent layer in one direction is run step by step, so that its pre-activations can be differentiated.

The terms of the parameters come from the gradients of the pre-activations. The rules of whole modules, which may have
several layers and two directions, and of cells are in :mod:`engm.rules.recurrent`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..terms import LinearFactors, PerExampleGradient, Term, accumulation_dtype
from ..torch_internals import own_parameters

State = tuple[Tensor, ...]
"""The hidden state ``[n, H]``, and of an LSTM the cell state ``[n, H]`` too."""


@dataclass
class Recorded:
    """What one run of a layer in one direction computed. Lists have one tensor a step.

    Attributes:
        inputs: ``x_t``, ``[n, T, p]``.
        from_inputs: ``W_ih x_t + b_ih`` of all steps, ``[n, T, gates * H]``.
        hidden: the hidden state before each step, ``[n, H]``.
        from_hidden: ``W_hh h_{t-1} + b_hh`` of each step, ``[n, gates * H]``.
        unprojected: of an LSTM with projections, the new hidden state before its projection, ``[n, H]``.
        projected: of an LSTM with projections, the new hidden state after its projection, ``[n, P]``.
    """

    inputs: Tensor
    from_inputs: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    from_hidden: list[Tensor] = field(default_factory=list)
    unprojected: list[Tensor] = field(default_factory=list)
    projected: list[Tensor] = field(default_factory=list)

    @property
    def targets(self) -> list[Tensor]:
        """The tensors whose gradients are wanted."""
        return [self.from_inputs, *self.from_hidden, *self.projected]


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


def _wanted(tensor: Tensor) -> Tensor:
    """The tensor, made a leaf that can be differentiated if it was computed without a graph."""
    return tensor if tensor.requires_grad else tensor.requires_grad_()


def run_layer(
    kind: str, weights: Weights, inputs: Tensor, state: State, steps: Sequence[int], present: Tensor | None
) -> tuple[Tensor, State, Recorded]:
    """Runs one layer in one direction.

    Args:
        kind: ``"LSTM"``, ``"GRU"``, ``"RNN_TANH"`` or ``"RNN_RELU"``.
        weights: the layer's parameters.
        inputs: ``[n, T, p]``.
        state: the initial state.
        steps: the order in which positions are read.
        present: ``[n, T]``, which positions exist; at others an example's state stays as it is. None: all exist.

    Returns:
        The hidden states ``[n, T, H]``, the last state, and what is needed for the gradients.
    """
    recorded = Recorded(inputs, _wanted(nn.functional.linear(inputs, weights.ih, weights.bias_ih)))
    from_inputs = recorded.from_inputs.unbind(1)
    outputs: list[Tensor] = [state[0]] * len(steps)
    for t in steps:
        from_hidden = _wanted(nn.functional.linear(state[0], weights.hh, weights.bias_hh))
        recorded.hidden.append(state[0].detach())
        recorded.from_hidden.append(from_hidden)
        new = _step(kind, from_inputs[t], from_hidden, state)
        if weights.hr is not None:
            recorded.unprojected.append(new[0].detach())
            recorded.projected.append(new[0] @ weights.hr.t())
            new = (recorded.projected[-1], *new[1:])
        if present is not None:
            here = present[:, t, None]
            new = tuple(torch.where(here, after, before) for after, before in zip(new, state, strict=True))
        state = new
        outputs[t] = state[0]
    return torch.stack(outputs, 1), state, recorded


def _step(kind: str, from_inputs: Tensor, from_hidden: Tensor, state: State) -> State:
    """The next state, before any projection."""
    if kind == "GRU":
        (r_x, z_x, new_x), (r_h, z_h, new_h) = from_inputs.chunk(3, 1), from_hidden.chunk(3, 1)
        reset, update = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
        new = torch.tanh(new_x + reset * new_h)
        return (new + update * (state[0] - new),)
    if kind == "LSTM":
        enter, forget, cell, out = (from_inputs + from_hidden).chunk(4, 1)
        c = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(cell)
        return torch.sigmoid(out) * torch.tanh(c), c
    return (torch.tanh(from_inputs + from_hidden) if kind == "RNN_TANH" else torch.relu(from_inputs + from_hidden),)


def layer_terms(
    recorded: Recorded, gradients: Sequence[Tensor], suffix: str, names: tuple[str, ...]
) -> dict[str, Term]:
    """Terms of the parameters of one layer and direction.

    Args:
        recorded: the layer's run.
        gradients: of :attr:`Recorded.targets`, in their order.
        suffix: what the parameters' names end in.
        names: the parameters that are wanted.
    """
    count = len(recorded.hidden)
    from_inputs, rest = gradients[0], gradients[1:]
    from_hidden = torch.stack(list(rest[:count]), 1)
    found: dict[str, Term] = {}
    if f"weight_ih{suffix}" in names:
        found[f"weight_ih{suffix}"] = LinearFactors(recorded.inputs.detach(), from_inputs)
    if f"weight_hh{suffix}" in names:
        found[f"weight_hh{suffix}"] = LinearFactors(torch.stack(recorded.hidden, 1), from_hidden)
    if f"weight_hr{suffix}" in names:
        found[f"weight_hr{suffix}"] = LinearFactors(
            torch.stack(recorded.unprojected, 1), torch.stack(list(rest[count:]), 1)
        )
    for name, gradient in ((f"bias_ih{suffix}", from_inputs), (f"bias_hh{suffix}", from_hidden)):
        if name in names:
            found[name] = PerExampleGradient(gradient.sum(1, dtype=accumulation_dtype(gradient)))
    return found


def backpropagated(
    recorded: Sequence[Recorded], outputs: Sequence[Tensor], backprops: Sequence[Tensor | None]
) -> list[list[Tensor]]:
    """Gradients of each run's targets.

    Args:
        recorded: the runs of all layers and directions.
        outputs: what was computed from the runs.
        backprops: gradients of ``outputs``; None counts as zero.

    Returns:
        For every run the gradients of its :attr:`Recorded.targets`.
    """
    given = [(o, g.to(o.dtype)) for o, g in zip(outputs, backprops, strict=True) if g is not None]
    targets = [target for record in recorded for target in record.targets]
    found = torch.autograd.grad([o for o, _ in given], targets, [g for _, g in given], allow_unused=True)
    filled = iter(torch.zeros_like(t) if g is None else g for t, g in zip(targets, found, strict=True))
    return [[next(filled) for _ in record.targets] for record in recorded]
