"""The rules of recurrent layers and cells: the forward pass is run again, and back to the pre-activations.

With the pre-activations ``P_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh`` of a step, ``dL_i/dW_ih = sum_t dP_t x_t^T``
and ``dL_i/dW_hh = sum_t dP_t h_{t-1}^T``: a linear layer over the positions ``t``. Neither the fused kernels nor the
graph give the ``dP_t``, so the layer is computed once more (the input's part of all steps in one matrix product) and
differentiated by hand, from the gradients of its outputs to the ``P_t`` alone, which is exact. In the GRU the new gate
reads ``r (W_hn h + b_hn)``, so there the two parts of ``P_t`` have gradients of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from ..checks import RefusedError
from ..ops import uncast
from ..terms import Term, accumulation_dtype
from ..torch_internals import recurrent_parameters
from .arguments import Arguments
from .base import CPU, Cost, WholeCallRule, add_rule
from .entries import names_of
from .linear import matrix_cost
from .recurrence import LayerRun, State, Weights, layer_terms

# The operators that torch computes recurrent layers by, and those of them that read a parameter as it is.
READING = names_of(
    """
    Add Addmm AsStrided Cat Copy CopySlices CudnnRnn Linear LstmMps MiopenRnn MkldnnRnnLayer Mm Narrow ReshapeAlias
    Select Slice Split SplitWithSizes T ThnnFusedGruCell ThnnFusedLstmCell ToCopy Transpose UnsafeView Unsqueeze View
    """
)
STEPS = READING | names_of(
    """
    Bmm Chunk Clone Div Expand IndexSelect Mul NativeDropout PackPaddedSequence Relu Rsub Sigmoid Squeeze Stack Sub Tanh
    Unbind UnsafeSplit
    """
)


@dataclass(frozen=True)
class Dropout:
    """What it takes to draw the dropout masks between the layers again, and to see that they are the same.

    Attributes:
        random_state: of the CPU's generator before the call; None where the masks were drawn on another device.
        last_hidden: ``h_n`` of the call, ``[layers * directions, n, H]``, which depends on every element of every mask.
    """

    random_state: Tensor | None
    last_hidden: Tensor


@dataclass(frozen=True)
class Remembered:
    """What is kept of a call besides its arguments.

    Attributes:
        name: the layer's name in the network.
        packing: ``batch_sizes``, ``sorted_indices`` and ``unsorted_indices`` of packed sequences; None without.
        batched: whether there was a dimension of examples; a single sequence is a batch of one.
        dropout: what is known of the masks, if the layer dropped out between its layers.
        batch_first: whether the examples lie along the first dimension.
    """

    name: str
    packing: tuple[Any, ...] | None = None
    batched: bool = True
    dropout: Dropout | None = None
    batch_first: bool = False

    def packed(self, data: Tensor) -> PackedSequence:
        """``data`` packed as the call's input was."""
        return PackedSequence(data, *(self.packing or ()))


def matrices_cost(length: int, shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> Cost:
    """Cost of the norms of weight matrices ``[d, p]`` over ``length`` positions; the second run is not counted."""
    costs = [matrix_cost(length, p, d, device, dtype) for d, p in shapes]
    dearest = max(costs, key=lambda cost: cost.flops)
    sums = [sum(getattr(c, name) for c in costs) for name in ("flops", "direct_flops", "gram_flops", "bytes")]
    return Cost(dearest.form, *sums)


@add_rule(nn.LSTM, nn.GRU, nn.RNN)
class RecurrentRule(WholeCallRule):
    """``[n, T, p]``, ``[T, n, p]``, ``[T, p]`` or packed sequences; any number of layers, one direction or both.

    Initial states belong to the data: the rule reads them, and gradients flow to them by autograd as ever. In training
    mode dropout between the layers is drawn again from the random state before the call, which works on the CPU alone.
    """

    operators: ClassVar = dict.fromkeys(STEPS, ())
    on_parameters = READING

    def known_parameters(self, module: Any) -> tuple[str, ...]:
        return recurrent_parameters(module)

    def before(self, module: Any) -> Tensor | None:
        on_cpu = module.weight_ih_l0.device.type == "cpu"
        return torch.get_rng_state() if _drops_out(module) and on_cpu else None

    def batch(self, module: Any, arguments: Arguments, outputs: Sequence[Any]) -> int:
        inputs = arguments.get(0, "input")
        if isinstance(inputs, PackedSequence):
            return int(inputs.batch_sizes[0])
        if inputs.dim() == 2:
            return 1
        return int(inputs.shape[0 if module.batch_first else 1])

    def save_call(
        self, module: Any, name: str, arguments: Arguments, outputs: Sequence[Any], before: Any
    ) -> Remembered:
        inputs = arguments.get(0, "input")
        packing = tuple(inputs[1:]) if isinstance(inputs, PackedSequence) else None
        hidden = outputs[1] if packing is None else outputs[4]
        dropout = Dropout(before, hidden.detach().clone()) if _drops_out(module) else None
        return Remembered(name, packing, packing is not None or inputs.dim() == 3, dropout, module.batch_first)

    def by_example(self, module: Any, saved: Remembered, backprops: Sequence[Tensor | None]) -> list[Tensor]:
        return [g for g in self._backprops(module, saved, backprops) if g is not None]

    def terms(
        self,
        module: Any,
        activations: Arguments,
        backprops: Sequence[Tensor | None],
        saved: Remembered,
        names: tuple[str, ...],
    ) -> dict[str, Term]:
        gradients = self._backprops(module, saved, backprops)
        dtype = accumulation_dtype(next(g for g in gradients if g is not None))
        with torch.no_grad(), uncast(module.weight_ih_l0.device):
            return _Run(module, saved, activations, dtype).terms(gradients, names)

    def cost(
        self,
        module: Any,
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> Cost:
        length = input_shape[1 if module.batch_first and len(input_shape) == 3 else 0]
        shapes = [tuple(p.shape) for p in module.parameters() if p.dim() == 2]
        return matrices_cost(length, shapes, device, dtype)

    def _backprops(self, module: Any, saved: Remembered, backprops: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the output ``[n, T, H]`` and of the last states, ``[n, layers * directions, H]`` each."""
        first, *states = backprops if saved.packing is None else (backprops[0], *backprops[4:])
        if first is not None:
            first = _examples_first(saved, first)
        return [first, *(None if g is None else _state_examples_first(saved, g) for g in states)]


def _drops_out(module: Any) -> bool:
    return bool(module.training and module.dropout > 0 and module.num_layers > 1)


def _examples_first(saved: Remembered, sequences: Tensor) -> Tensor:
    """``[n, T, p]`` from sequences as the layer takes and returns them."""
    if saved.packing is not None:
        return pad_packed_sequence(saved.packed(sequences), batch_first=True)[0]
    if not saved.batched:
        return sequences.unsqueeze(0)
    return sequences if saved.batch_first else sequences.transpose(0, 1)


def _state_examples_first(saved: Remembered, state: Tensor) -> Tensor:
    """``[n, layers * directions, H]`` from a state as the layer takes and returns it."""
    return state.transpose(0, 1) if saved.batched else state.unsqueeze(0)


class _Run:
    """The second run of a call, forwards and back.

    Attributes:
        runs: every layer and direction.
        suffixes: what parameters' names end in, for every layer and direction.
    """

    def __init__(self, module: Any, saved: Remembered, arguments: Arguments, dtype: torch.dtype) -> None:
        self.module, self.saved, self.dtype = module, saved, dtype
        inputs, initial = arguments.get(0, "input"), arguments.get(1, "hx")
        self.present: Tensor | None = None
        if isinstance(inputs, PackedSequence):
            padded, lengths = pad_packed_sequence(inputs, batch_first=True)
            positions = torch.arange(padded.shape[1], device=lengths.device)
            self.present = (positions < lengths.unsqueeze(1)).to(padded.device)
        else:
            padded = _examples_first(saved, inputs)
        self.inputs = padded.to(dtype)
        self.directions = 2 if module.bidirectional else 1
        self.suffixes = [
            f"_l{layer}" + ("_reverse" if direction else "")
            for layer in range(module.num_layers)
            for direction in range(self.directions)
        ]
        self.initial = self._states(initial)
        self.runs: list[LayerRun] = []
        self.masks: list[Tensor] = []  # by which the outputs of all layers but the last were multiplied, if they were
        self._run()

    def _states(self, given: Any) -> list[Tensor]:
        """Initial states ``[n, layers * directions, H]``."""
        if given is not None:
            states = given if isinstance(given, tuple | list) else (given,)
            return [_state_examples_first(self.saved, state).to(self.dtype) for state in states]
        module, shape = self.module, (self.inputs.shape[0], len(self.suffixes))
        hidden = self.inputs.new_zeros(*shape, module.proj_size or module.hidden_size)
        return [hidden, self.inputs.new_zeros(*shape, module.hidden_size)] if module.mode == "LSTM" else [hidden]

    def _run(self) -> None:
        """Run all layers forwards."""
        masks = self._masks()
        flowing = self.inputs
        for number, suffix in enumerate(self.suffixes):
            layer, direction = divmod(number, self.directions)
            if layer and not direction:
                flowing = torch.cat([run.outputs for run in self.runs[-self.directions :]], 2)
                if masks is not None:
                    self.masks.append(masks.draw(flowing))
                    flowing = flowing * self.masks[-1]
            weights, state = Weights(self.module, suffix, self.dtype), tuple(s[:, number] for s in self.initial)
            mode, reverse = self.module.mode, bool(direction)
            self.runs.append(LayerRun(mode, weights, flowing, state, reverse=reverse, present=self.present))
        if masks is not None:
            masks.check(torch.stack([run.end for run in self.runs], 1))

    def terms(self, backprops: Sequence[Tensor | None], names: tuple[str, ...]) -> dict[str, Term]:
        """Terms of the parameters in ``names``; may be asked for once.

        Args:
            backprops: gradients of the output ``[n, T, H]`` and of the last states ``[n, layers * directions, H]``.
            names: the parameters that are wanted.
        """
        flowing, *ends = (None if g is None else g.to(self.dtype) for g in backprops)
        found: dict[str, Term] = {}
        below: Tensor | None = None  # gradient of a layer's inputs
        for number in reversed(range(len(self.runs))):
            run, (layer, direction) = self.runs[number], divmod(number, self.directions)
            width = run.outputs.shape[2]
            own = None if flowing is None else flowing[:, :, direction * width : (direction + 1) * width]
            gradients = run.backpropagated(own, [None if end is None else end[:, number] for end in ends])
            found.update(layer_terms(run, gradients, self.suffixes[number], names))
            if layer:
                part = gradients.from_inputs @ run.weights.ih
                below = part if below is None else below + part
            if layer and not direction and below is not None:
                flowing, below = below * self.masks[layer - 1] if self.masks else below, None
        return found

    def _masks(self) -> _Masks | None:
        return None if self.saved.dropout is None else _Masks(self.module, self.saved, self.saved.dropout)


class _Masks:
    """Draws the dropout masks between the layers as the layer itself drew them."""

    def __init__(self, module: Any, saved: Remembered, dropout: Dropout) -> None:
        self.module, self.saved, self.dropout = module, saved, dropout
        if dropout.random_state is None:
            raise self._unknown("on a CUDA device it draws them where nobody can see them")
        self.generator = torch.Generator().set_state(dropout.random_state)

    def draw(self, flowing: Tensor) -> Tensor:
        """The mask for ``flowing [n, T, H]``, ``1 / (1 - p)`` or 0, drawn in the layout that the layer draws in."""
        n, length, size = flowing.shape
        if self.saved.packing is None:
            mask = self._drawn(length, n, size).transpose(0, 1)
        else:
            packed = self.saved.packed(self._drawn(int(self.saved.packing[0].sum()), size))
            mask, _ = pad_packed_sequence(packed, batch_first=True)
        return mask.to(flowing.dtype)

    def _drawn(self, *shape: int) -> Tensor:
        mask = torch.zeros(shape, dtype=self.module.weight_ih_l0.dtype)
        keep = 1 - self.module.dropout
        return mask.bernoulli_(keep, generator=self.generator).div_(keep) if keep > 0 else mask

    def check(self, hidden: Tensor) -> None:
        """Refuses masks with which the last hidden states come out as others than the layer's.

        Args:
            hidden: the last hidden states of the second run, ``[n, layers * directions, H]``.

        Raises:
            RuntimeError: they are not what the layer returned, so the masks are not the layer's.
        """
        expected = _state_examples_first(self.saved, self.dropout.last_hidden)
        tolerance = torch.finfo(expected.dtype).eps ** 0.5
        if not bool(((hidden.detach() - expected).abs() <= tolerance * expected.abs().max()).all()):
            raise self._unknown("drawing them again from the random state before the call gave others")

    def _unknown(self, why: str) -> RefusedError:
        return RefusedError(
            f"engm: layer '{self.saved.name}' ({type(self.module).__name__}) drops out between its layers, and the "
            f"masks that it drew cannot be told: {why}. Use separate layers with num_layers=1 and nn.Dropout between "
            "them."
        )


@add_rule(nn.LSTMCell, nn.GRUCell, nn.RNNCell)
class CellRule(WholeCallRule):
    """One step, ``[n, p]`` or ``[p]``; called in a loop, every call is a use of the parameters."""

    parameter_names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    joins = True
    operators: ClassVar = dict.fromkeys(STEPS, ())
    on_parameters = READING

    def save_call(self, module: Any, name: str, arguments: Arguments, outputs: Sequence[Any], before: Any) -> str:
        return _kind(module)

    def joined(
        self, module: Any, calls: Sequence[tuple[Arguments, Sequence[Tensor | None]]]
    ) -> tuple[Arguments, tuple[Tensor | None, ...]]:
        inputs = [_rows(arguments.get(0, "input")) for arguments, _ in calls]
        states = [self._state(module, call[0].get(1, "hx"), x) for call, x in zip(calls, inputs, strict=True)]
        state = tuple(map(torch.cat, zip(*states, strict=True)))
        gradients: list[Tensor | None] = []
        for given in zip(*(backprops for _, backprops in calls), strict=True):
            known = next((g for g in given if g is not None), None)
            if known is not None:
                width = known.shape[-1]
                filled = [
                    x.new_zeros(len(x), width) if g is None else _rows(g) for g, x in zip(given, inputs, strict=True)
                ]
                known = torch.cat(filled)
            gradients.append(known)
        hidden = state if isinstance(module, nn.LSTMCell) else state[0]
        return Arguments((torch.cat(inputs), hidden), {}), tuple(gradients)

    def batch(self, module: nn.Module, arguments: Arguments, outputs: Sequence[Any]) -> int:
        inputs = arguments.get(0, "input")
        return 1 if inputs.dim() == 1 else int(inputs.shape[0])

    def by_example(self, module: Any, saved: Any, backprops: Sequence[Tensor | None]) -> list[Tensor]:
        return [_rows(g) for g in backprops if g is not None]

    def terms(
        self,
        module: Any,
        activations: Arguments,
        backprops: Sequence[Tensor | None],
        saved: Any,
        names: tuple[str, ...],
    ) -> dict[str, Term]:
        gradients = [None if g is None else _rows(g) for g in backprops]
        dtype = accumulation_dtype(next(g for g in gradients if g is not None))
        inputs = _rows(activations.get(0, "input")).to(dtype)
        with torch.no_grad(), uncast(inputs.device):
            state = self._state(module, activations.get(1, "hx"), inputs)
            run = LayerRun(saved, Weights(module, "", dtype), inputs.unsqueeze(1), state)
            found = run.backpropagated(None, [None if g is None else g.to(dtype) for g in gradients])
        return layer_terms(run, found, "", names)

    def cost(
        self,
        module: Any,
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> Cost:
        return matrices_cost(1, [tuple(p.shape) for p in module.parameters() if p.dim() == 2], device, dtype)

    def _state(self, module: Any, given: Any, inputs: Tensor) -> State:
        if given is None:
            zero = inputs.new_zeros(inputs.shape[0], module.hidden_size)
            return (zero, zero) if isinstance(module, nn.LSTMCell) else (zero,)
        states = given if isinstance(given, tuple | list) else (given,)
        return tuple(_rows(state).to(inputs.dtype) for state in states)


def _rows(tensor: Tensor) -> Tensor:
    """``[n, p]`` from what a cell takes or returns; a single example is a batch of one."""
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor


def _kind(module: Any) -> str:
    if isinstance(module, nn.RNNCell):
        return f"RNN_{module.nonlinearity.upper()}"
    return "LSTM" if isinstance(module, nn.LSTMCell) else "GRU"
