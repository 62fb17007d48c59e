"""Random networks: directed acyclic graphs of layers and the operations that users put between them.

A network is a list of steps over a growing list of values. Steps may change a value in place, take a view of it, call
a layer that was called before, drop out at random, run without gradients, or leave their result unused. Some can be
skipped from one forward pass to the next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "relu_": torch.relu_,
    "tanh_": torch.tanh_,
    "scale_": lambda x: x.mul_(1.5),
    "dropout": lambda x: F.dropout(x, 0.3),
    "detach": torch.Tensor.detach,
    "flatten": lambda x: x.flatten(1),
    "flatten one": lambda x: x.flatten(1, 2),
    "transpose": lambda x: x.transpose(1, -1),
    "contiguous": lambda x: x.transpose(1, -1).contiguous(),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "drop": lambda x: x[:, 0],
    "narrow": lambda x: x[..., :-1],
    "chunk": lambda x: x.chunk(2, 1)[1],
    "mean": lambda x: x.mean(-1),
    "max_pool": lambda x: F.max_pool1d(x, 2, 1),
    "avg_pool": lambda x: F.avg_pool2d(x, 2, 1),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "add": torch.add,
    "add_": lambda x, y: x.add_(y),
    "multiply": torch.mul,
    "concatenate": lambda x, y: torch.cat([x, y], 1),
}
TWO = ("add", "add_", "multiply", "concatenate")  # of equal shapes

CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "call": lambda layer, x: layer(x),
    "keyword": lambda layer, x: layer(x=x) if isinstance(layer, nn.RMSNorm) else layer(input=x),
    "function": lambda layer, x: F.linear(x, layer.weight, layer.bias),
    "second": lambda layer, x: layer(x.transpose(0, 1)).transpose(0, 1),
    "folded": lambda layer, x: layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]),
    "folded second": lambda layer, x: (
        layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, x.shape[1::-1]).transpose(0, 1)
    ),
}


class Scale(nn.Module):
    """A parameter of its own for every feature."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(shape[-1]))

    def forward(self, input: Tensor) -> Tensor:
        return input * self.gain


class Temperature(nn.Module):
    """A parameter that is a single number, of no dimension."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(0.1 * torch.randn(()))

    def forward(self, input: Tensor) -> Tensor:
        return input * self.logarithm.exp()


class Positions(nn.Module):
    """A table that is added to every example."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, *shape))

    def forward(self, input: Tensor) -> Tensor:
        return input + self.table


class Token(nn.Module):
    """A row that goes in front of every example."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.randn(1, *shape[1:]))

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([self.row.expand(len(input), *self.row.shape), input], 1)


HELD = (Scale, Temperature, Positions, Token)


@dataclass(frozen=True)
class Step:
    """One step makes one more value of ``values[sources]``.

    Attributes:
        operation: a key of :data:`OPERATIONS`, or ``"layer"``.
        sources: which values.
        layer: index of the layer, for ``"layer"``.
        how: the layer is called; a key of :data:`CALLS`.
        grad: run with gradients.
        residual: add the source to the result (of the same shape).
        skippable: the source is the result where the step is skipped (of the same shape).
    """

    operation: str
    sources: tuple[int, ...]
    layer: int = -1
    how: str = "call"
    grad: bool = True
    residual: bool = False
    skippable: bool = False


class RandomNetwork(nn.Module):
    """Runs the steps; the values in ``outputs``, flattened and side by side, are the result ``[n, *]``."""

    def __init__(self, layers: Collection[nn.Module], steps: tuple[Step, ...], outputs: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.steps = steps
        self.outputs = outputs
        self.skipped: frozenset[int] = frozenset()

    def forward(self, x: Tensor) -> Tensor:
        values = [x.clone()]
        for number, step in enumerate(self.steps):
            values.append(values[step.sources[0]] if number in self.skipped else self.result(step, values))
        return torch.cat([values[k].flatten(1) for k in self.outputs], 1)

    def result(self, step: Step, values: list[Tensor]) -> Tensor:
        sources = [values[k] for k in step.sources]
        with torch.set_grad_enabled(step.grad and torch.is_grad_enabled()):
            if step.operation != "layer":
                return OPERATIONS[step.operation](*sources)
            out = CALLS[step.how](self.layers[step.layer], sources[0])
            return out + sources[0] if step.residual else out


@dataclass
class Problem:
    """A network and how to run it.

    Attributes:
        net: in float64.
        shape: of one example.
        n: number of examples, as it is now.
        passes: for every forward pass, the number of examples and the steps that are skipped.
    """

    net: RandomNetwork
    shape: tuple[int, ...]
    n: int
    passes: tuple[tuple[int, frozenset[int]], ...]

    def each_pass(self) -> Iterator[None]:
        """Make ready for one forward pass after the other."""
        for n, skipped in self.passes:
            self.n, self.net.skipped = n, skipped
            yield

    def batch(self, seed: int = 0) -> Tensor:
        """``[n, *shape]``."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.n, *self.shape, generator=generator, dtype=torch.float64)

    def losses(self, model: nn.Module, x: Tensor) -> Tensor:
        """``[n]`` losses, the same for every call of the same model."""
        torch.manual_seed(1)  # of the dropouts
        out = model(x)
        weights = torch.linspace(-1, 1, out[0].numel(), dtype=out.dtype)
        return (out * weights + 0.3 * out.square()).sum(1)

    @property
    def couples(self) -> bool:
        """Whether a batch norm of the network takes its statistics from the batch."""
        norms = [m for m in self.net.modules() if isinstance(m, _BatchNorm)]
        return any(m.training or m.running_mean is None for m in norms)


@st.composite
def problems(draw: Any, *, batch_norm: bool = True, outside: bool = False, most_steps: int = 9) -> Problem:
    """Random problems.

    Args:
        draw: hypothesis's.
        batch_norm: batch norms may be in training mode.
        outside: parameters may be used outside of layers that have a rule, and the examples may lie along the second
            dimension or in several rows.
        most_steps: at most so many steps.
    """
    torch.manual_seed(draw(st.integers(0, 9)))
    n = draw(st.sampled_from([2, 3, 4, 1, 5]))
    shape = draw(st.sampled_from([(5,), (4, 3), (3, 5), (2, 4, 5), (4, 3, 3), (2, 3, 3, 3)]))
    builder = _Builder(draw, n, shape, batch_norm, outside)
    for _ in range(draw(st.integers(1, most_steps))):
        builder.grow()
    assume(builder.layers)
    outputs = draw(st.lists(st.integers(0, len(builder.values) - 1), max_size=2, unique=True))
    last = len(builder.values) - 1
    net = RandomNetwork(builder.layers, tuple(builder.steps), tuple(dict.fromkeys([last, *outputs]))).double()
    for parameter in net.parameters():
        parameter.requires_grad_(draw(st.sampled_from([True, True, True, True, False])))
    assume(any(parameter.requires_grad for parameter in net.parameters()))
    skippable = [number for number, step in enumerate(net.steps) if step.skippable]
    skips = st.just(frozenset()) if not skippable else st.frozensets(st.sampled_from(skippable))
    sizes = st.sampled_from([n, n, n, n + 1, 1])
    problem = Problem(net, shape, n, tuple(draw(st.lists(st.tuples(sizes, skips), min_size=1, max_size=3))))
    assume(_trains(problem))
    return problem


def _trains(problem: Problem) -> bool:
    """Whether the losses have a graph, or torch refuses the forward pass (in-place changes of some views)."""
    try:
        return copy.deepcopy(problem.net)(problem.batch()).requires_grad
    except RuntimeError:
        return True


class _Builder:
    """Grows a list of steps, each of which fits the shapes of the values before it."""

    def __init__(self, draw: Any, n: int, shape: tuple[int, ...], batch_norm: bool, outside: bool) -> None:
        self.draw = draw
        self.batch_norm = batch_norm
        self.outside = outside
        self.layers: list[nn.Module] = []
        self.steps: list[Step] = []
        self.values = [torch.randn(n, *shape, dtype=torch.float64)]

    def grow(self) -> None:
        last = len(self.values) - 1
        source = self.draw(st.sampled_from([last, last, last, *range(len(self.values))]))
        shape = tuple(self.values[source].shape[1:])
        kind = self.draw(st.sampled_from(["new layer", "new layer", "old layer", "one value", "two values"]))
        if kind == "new layer":
            if self.outside and self.draw(st.booleans()):
                held = self.draw(st.sampled_from(HELD if len(shape) > 1 else HELD[:3]))
                self.layers.append(held(shape).double())
            else:
                self.layers.append(self.draw(_layers(shape, self.batch_norm)).double())
            self._call(len(self.layers) - 1, source)
        elif kind == "old layer":
            fitting = [k for k, layer in enumerate(self.layers) if _fits(layer, self.values[source])]
            if fitting:
                self._call(self.draw(st.sampled_from(fitting)), source)
        elif kind == "one value":
            self._add(Step(self.draw(st.sampled_from(_operations(shape))), (source,)))
        else:
            alike = [k for k, value in enumerate(self.values) if value.shape[1:] == shape]
            self._add(Step(self.draw(st.sampled_from(TWO)), (source, self.draw(st.sampled_from(alike)))))

    def _call(self, layer: int, source: int) -> None:
        grad = self.draw(st.sampled_from([True] * 5 + [False]))
        how = self.draw(st.sampled_from(["call"] * 4 + ["keyword"] + self._other_calls(layer, source)))
        step = Step("layer", (source,), layer, how, grad)
        value = _run(self.layers, step, self.values)
        assume(value is not None)
        if value.shape == self.values[source].shape:
            residual, skippable = self.draw(st.booleans()), self.draw(st.booleans())
            step = Step("layer", (source,), layer, how, grad, residual, skippable)
        self._add(step)

    def _other_calls(self, layer: int, source: int) -> list[str]:
        module = self.layers[layer]
        if not self.outside or not isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm):
            return []
        calls = ["function"] * 2 if isinstance(module, nn.Linear) else []
        inner = len(module.normalized_shape) if isinstance(module, nn.LayerNorm | nn.RMSNorm) else 1
        return calls + (["second", "folded", "folded second"] if self.values[source].dim() > 1 + inner else [])

    def _add(self, step: Step) -> None:
        value = _run(self.layers, step, self.values)
        assume(value is not None and value.numel() <= 1000)
        self.values.append(value)
        self.steps.append(step)


def _run(layers: list[nn.Module], step: Step, values: list[Tensor]) -> Tensor | None:
    """The value of a step, of numbers alone; None where torch refuses (one value a channel in a batch norm)."""
    try:
        with torch.no_grad():
            return RandomNetwork(layers, (), ()).result(step, [value.clone() for value in values])
    except (ValueError, RuntimeError):
        return None


def _fits(layer: nn.Module, value: Tensor) -> bool:
    return (
        value.dim() > 1 and _run([layer], Step("layer", (0,), 0), [value]) is not None and not _unbatched(layer, value)
    )


def _unbatched(layer: nn.Module, value: Tensor) -> bool:
    """Whether a layer for images and the like would take the whole batch for one example."""
    dims = next((d for d in (1, 2, 3) if f"{d}d" in type(layer).__name__), None)
    return dims is not None and not isinstance(layer, nn.BatchNorm1d) and value.dim() != dims + 2


def _operations(shape: tuple[int, ...]) -> list[str]:
    dims = len(shape)
    names = ["relu", "tanh", "gelu", "relu_", "tanh_", "scale_", "dropout", "detach", "flatten", "unsqueeze"]
    if shape[-1] > 1:
        names += ["narrow"]
    if dims > 1:
        names += ["transpose", "contiguous", "drop", "mean", "flatten one"]
    if dims > 1 and shape[0] > 1:
        names += ["chunk"]
    if dims == 2 and shape[-1] > 1:
        names += ["max_pool"]
    if dims == 3:
        names += ["channels_last"] + (["avg_pool"] if min(shape[1:]) > 1 else [])
    return names


@st.composite
def _layers(draw: Any, shape: tuple[int, ...], batch_norm: bool) -> nn.Module:
    """A layer that takes ``[n, *shape]``, with random statistics where it keeps some."""
    dims, channels = len(shape) - 1, shape[0]
    bias = draw(st.booleans())
    kinds = ["linear", "layer_norm", "rms_norm", "group_norm"]
    if dims < 4:
        kinds += ["batch_norm"] * (3 if batch_norm else 1)
    if 1 <= dims <= 3:
        kinds += ["conv", "conv"] + (["instance_norm"] if max(shape[1:]) > 1 else [])
    kind = draw(st.sampled_from(kinds))
    if kind == "linear":
        return nn.Linear(shape[-1], draw(st.sampled_from([shape[-1], 1, 3, 6])), bias=bias)
    trailing = list(shape[-draw(st.integers(1, len(shape))) :])
    assume(kind not in ("layer_norm", "rms_norm") or prod(trailing) > 1)
    if kind == "layer_norm":
        return _shaken(nn.LayerNorm(trailing, bias=bias))
    if kind == "rms_norm":
        return _shaken(nn.RMSNorm(trailing))
    if kind == "group_norm":
        groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
        return _shaken(nn.GroupNorm(groups, channels))
    if kind == "conv":
        return draw(_convolutions(shape, bias))
    if kind == "instance_norm":
        norms = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
        norm = norms[dims](channels, affine=True, track_running_stats=draw(st.booleans()))
    else:
        norms = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
        tracked = draw(st.booleans()) or not batch_norm
        norm = norms[dims](channels, affine=draw(st.sampled_from([True, True, False])), track_running_stats=tracked)
    mode = draw(st.sampled_from([True, True, False]))
    return _shaken(norm).train(mode and (batch_norm or kind == "instance_norm"))


@st.composite
def _convolutions(draw: Any, shape: tuple[int, ...], bias: bool) -> nn.Module:
    channels, *size = shape
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(size)]
    kernel = [draw(st.integers(1, min(3, length))) for length in size]
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "circular"]))
    padding: Any = [draw(st.integers(0, min(1, length - 1))) for length in size]
    stride = [draw(st.sampled_from([1, 1, 2])) for _ in size]
    if draw(st.sampled_from([False, False, True])):
        padding, stride, mode = "same", [1] * len(size), "zeros"
    groups = draw(st.sampled_from([1, channels]))
    rows = groups * draw(st.sampled_from([1, 2]))
    return convolution(channels, rows, kernel, stride, padding, groups=groups, bias=bias, padding_mode=mode)


def _shaken(norm: nn.Module) -> nn.Module:
    """Scale, shift and running statistics as they might be after some training."""
    with torch.no_grad():
        for tensor in [*norm.parameters(), *norm.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    return norm
