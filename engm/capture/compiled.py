"""Calls inside regions that ``torch.compile`` made one function of: how their backprops get out.

AOTAutograd turns a region into one autograd node, so no hook sees what happens inside. Therefore the region itself, as
it is traced, gets a *tap* at the output of every layer with a rule. A tap is the identity whose backward pass hands the
output's gradient and the layer's input to the collector by an operator that the compiler cannot see through. Nothing
would keep that operator alive if it had no result, so it returns a gradient (zero) of a *token*: a tensor that enters
every region and stands for one forward pass. A backward pass to the token runs the region.

Layers that take statistics from the batch are not tapped: they break the graph and run uncompiled, because a pass with
frozen statistics needs a node of their own (:mod:`engm.batch_norm.frozen`).
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._C import reads_activations
from ..checks import RefusedError
from ..rules import Rule
from ..torch_internals import (
    Node,
    dynamo_in_use,
    graphs_that_can_be_kept,
    guard_hooks,
    in_operator_of_graphs,
    is_compiled_region,
    own_buffers,
    skip_code,
    trained_of,
    untracked_alias,
    version_of,
    whatever_hooks,
)
from .calls import Call, Capture, Collector

SEGMENT_KEY = "_engm_segment"  # attribute of a token

Hook = Callable[..., Any]

_numbers = itertools.count(1)
_segments: weakref.WeakValueDictionary[int, Segment] = weakref.WeakValueDictionary()
# A region reads both lists as it starts: the token of the forward pass whose calls it notes, and the number of the call
# before its first.
_token: list[Tensor] = [torch.zeros(1, dtype=torch.float64, device="cpu")]
_latest: list[Tensor] = [torch.zeros(1, dtype=torch.float64, device="cpu")]


@dataclass
class Recording:
    """One captured forward pass, as the regions that run in it see it.

    Attributes:
        capture: the forward pass.
        layers: name to module and rule, of the layers that may be called.
        thread: the one that it runs in.
        open: whether it still runs.
    """

    capture: Capture
    layers: Mapping[str, tuple[nn.Module, Rule]]
    thread: int
    open: bool = True

    def issue_token(self) -> None:
        """The next region that starts gets a new token."""
        number = next(_numbers)
        segment = Segment(self)
        token = torch.full((1,), float(number), dtype=torch.float64, device="cpu").requires_grad_()
        setattr(token, SEGMENT_KEY, segment)
        _segments[number] = segment
        _token[0] = token


class Segment:
    """The calls of one run of one region, in order. Its token owns it, and the graph owns the token."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.calls: list[CompiledCall] = []


class CompiledCall(Call):
    """A call inside a compiled region. Its input is at hand only while its backprops are."""

    def __init__(
        self, capture: Capture, name: str, module: nn.Module, rule: Rule, activations: Tensor, output: Tensor
    ) -> None:
        super().__init__(capture, name, module, rule, activations, output)
        self._activations = None  # the region may write something else into its memory

    def _save(self, activations: Any, output: Tensor) -> Any:
        # Statistics of the batch at hand are computed from the input when they are needed; running ones are noted now.
        return super()._save(activations, output) if own_buffers(self.module) else None

    def hand_over(self, collector: Collector, backprops: Tensor, activations: Tensor) -> None:
        """Give the collector what the region computed. The region reuses memory, so what is held must be a copy."""
        if collector.holds(self):
            backprops, activations = backprops.clone(), activations.clone()
        self._activations, self._versions = activations, version_of(activations)
        if self.saved is None and self.parameters:
            self.saved = self.rule.save(self.module, activations, backprops)
        try:
            collector.receive(self, backprops)
        finally:
            self._activations = None


# -- inside the region ------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "engm::note_call",
    mutates_args=(),
    schema="(Tensor output, Tensor activations, Tensor token, Tensor latest, str name) -> Tensor",
)
def _note_call(output: Tensor, activations: Tensor, token: Tensor, latest: Tensor, name: str) -> Tensor:
    segment = _segments.get(int(token))
    if segment is None or not segment.recording.open:  # run again in a backward pass
        return torch.full_like(token, -1.0)
    recording = segment.recording
    if recording.thread != threading.get_ident():
        raise RefusedError(
            "engm: two threads run compiled regions of captured forward passes at the same time, and their calls "
            "cannot be told apart. Let one finish before the other starts."
        )
    if not segment.calls:
        recording.issue_token()
    module, rule = recording.layers[name]
    segment.calls.append(CompiledCall(recording.capture, name, module, rule, activations, output))
    return torch.full_like(token, len(segment.calls) - 1.0)


@_note_call.register_fake
def _note_call_fake(output: Tensor, activations: Tensor, token: Tensor, latest: Tensor, name: str) -> Tensor:
    return torch.empty_like(token)


@torch.library.custom_op(
    "engm::hand_backprops",
    mutates_args=(),
    schema="(Tensor backprops, Tensor activations, Tensor token, Tensor number, str name) -> Tensor",
)
def _hand_backprops(backprops: Tensor, activations: Tensor, token: Tensor, number: Tensor, name: str) -> Tensor:
    segment = _segments.get(int(token))
    queue = None if segment is None else segment.recording.capture.queue
    if segment is not None and queue is not None:
        if int(number) < 0:
            raise RefusedError(
                f"engm: layer '{name}' was run again in the backward pass of a compiled region, so its call cannot be "
                "told. Leave this part of the network uncompiled with torch.compiler.disable."
            )
        segment.calls[int(number)].hand_over(queue.collector, backprops, activations)
    return torch.zeros_like(token)


@_hand_backprops.register_fake
def _hand_backprops_fake(backprops: Tensor, activations: Tensor, token: Tensor, number: Tensor, name: str) -> Tensor:
    return torch.empty_like(token)


class _Tap(torch.autograd.Function):
    """The identity, whose backward pass hands the gradient and the layer's input over (see the module's docstring)."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, activations: Tensor, token: Tensor, number: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(activations, token, number)
        ctx.name = name
        return untracked_alias(output)  # no view, so that in-place operations may follow

    @staticmethod
    def backward(ctx: Any, backprops: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        activations, token, number = ctx.saved_tensors
        done = torch.ops.engm.hand_backprops(backprops, activations, token, number, ctx.name)
        return backprops, None, done, None, None


def tap(output: Tensor, activations: Tensor, name: str) -> Tensor:
    """Tap ``output``: called while a region is traced, for a layer that read ``activations``."""
    token = _token[0]
    number = torch.ops.engm.note_call(output.detach(), activations.detach(), token.detach(), _latest[0], name)
    # Each call is noted with the number of the one before it, and the last is a result of the region: so all are noted
    # in the forward pass and in order, and two calls of one layer on one tensor stay two.
    _latest[0] = number
    return _Tap.apply(output, activations, token, number, name)


# -- around the region ------------------------------------------------------------------------------------------------


@contextmanager
def capturing(capture: Capture, layers: Sequence[tuple[str, nn.Module, Rule]]) -> Iterator[None]:
    """Collect the calls of the regions that run inside."""
    if not dynamo_in_use():
        yield
        return
    recording = Recording(capture, {name: (module, rule) for name, module, rule in layers}, threading.get_ident())
    before, latest = _token[0], _latest[0]
    recording.issue_token()
    try:
        # Hooks are new in every captured pass, and no pass outside of them may leave a region behind that has no taps.
        with whatever_hooks(), graphs_that_can_be_kept():
            yield
    finally:
        _token[0], _latest[0], recording.open = before, latest, False


@contextmanager
def not_capturing() -> Iterator[None]:
    """Regions compiled inside must not be taken for those with taps later on."""
    if not dynamo_in_use():
        yield
        return
    # Parts that have no layers to tap are the same in both, and are kept in a captured pass.
    guard_hooks()
    with graphs_that_can_be_kept():
        yield


@functools.cache
def uncompiled() -> Callable[..., Any]:
    """``uncompiled()(function, *args)`` calls a function outside of any region."""
    reason = (
        "engm records this layer's call outside of compiled regions: it takes statistics from the batch, or does not "
        "take and return one tensor"
    )
    return torch.compiler.disable(_call, reason=reason)


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def traceable(
    before: Callable[..., None] | None, record: Hook, name: str, module: nn.Module, rule: Rule
) -> tuple[Callable[..., None] | None, Hook]:
    """Hooks that do what ``before`` and ``record`` do, and tap the layer where a region is being traced.

    Regions are traced once for many forward passes, so nothing that is read there may belong to one of them.
    """
    run = uncompiled()
    tapped = not rule.whole_call and not rule.couples(module)
    reads = tapped and reads_activations(rule, trained_of(module))

    def prepare(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not in_operator_of_graphs():
            run(before, module, args)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> Any:
        if in_operator_of_graphs():
            return None
        if not torch.compiler.is_compiling():
            return run(record, module, args, kwargs, output)
        if not torch.is_grad_enabled():
            return None
        activations = rule.activations(args, kwargs) if tapped else None
        if not (isinstance(output, Tensor) and isinstance(activations, Tensor)):
            return run(record, module, args, kwargs, output)
        if not output.requires_grad:
            return None
        return tap(output, activations if reads else output, name)

    # Where the region around the layer broke off, a hook must not become a region of its own, without the layer.
    for function in (prepare, hook):
        skip_code(function.__code__)
    return None if before is None else prepare, hook


# -- reading the graph ------------------------------------------------------------------------------------------------


def segment_of(token: Tensor) -> Segment:
    """The segment that a token stands for."""
    segment: Segment = getattr(token, SEGMENT_KEY)
    return segment


def calls_in(token: Tensor, node: Node) -> Sequence[Call]:
    """The calls of a token's segment.

    Args:
        token: of the segment.
        node: the region's.

    Raises:
        RuntimeError: no AOTAutograd made the region.
    """
    if not is_compiled_region(node):
        raise RefusedError(
            "engm: a part of this network was compiled with a backend that does not go through AOTAutograd (such as "
            "backend='eager'). Use backend='inductor' (the default) or 'aot_eager', or do not compile it."
        )
    return segment_of(token).calls
