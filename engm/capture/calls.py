"""Captured calls: what is remembered of one call of a module, and of one forward pass, until the graph is gone.

A call is written on the autograd node of its output, and a forward pass on the nodes of its outputs
(``csrc/graph_records.h``). So both live exactly as long as the graph that they belong to, whatever else the user does
with the model. In backward passes the node puts the gradient of the output into the queue of the call's forward pass if
there is one, from which a collector gets it; after all hooks of the user's on the same tensor, since the gradient that
they return is the one that counts.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .._C import NO_GRADIENTS, GradientQueue, note_call, note_inputs, write_record
from ..checks import RefusedError
from ..distributed import Ranks
from ..rules import Activations, Rule, WholeCallRule
from ..rules.arguments import Arguments, Frame
from ..torch_internals import (
    Node,
    address_of,
    own_parameters,
    trained_of,
    tree_leaves,
    version_of,
)
from .layers import named_modules

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


QUEUED_BYTES = 1 << 20
"""Of gradients that wait to be handed over together; as much is still in a processor's cache."""


class Collector(Protocol):
    """Whatever takes the gradients of captured calls while a backward pass runs."""

    def holds(self, call: Call) -> bool:
        """Whether the operands of a call are needed beyond :meth:`receive`."""

    def receive(self, call: Call, backprops: Any) -> None:
        """Take the gradient of a call's output (a tuple for a :class:`WholeCall`)."""


class Wrapper(Protocol):
    """What captures and graphs need to know of the wrapper whose forward pass was captured.

    Attributes:
        strict: whether gradients are compared with autograd's from time to time.
        coupled: what is done where examples influence each other's losses, ``"refuse"`` or ``"exact"``.
        shard_group: the processes that the network's parameters are split over, if they are.
    """

    strict: bool
    coupled: str
    shard_group: ProcessGroup | None

    def buffers(self) -> Iterator[Tensor]:
        """The network's buffers."""


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """``function`` of a value, or of every item of a tuple but Nones."""
    if isinstance(value, tuple):
        return tuple(None if item is None else function(item) for item in value)
    return function(value)


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None else version_of(tensor)


def _weakly(held: Tensor | weakref.ref[Tensor]) -> weakref.ref[Tensor]:
    return held if isinstance(held, weakref.ref) else weakref.ref(held)


def _alive(held: Tensor | weakref.ref[Tensor] | None) -> Tensor | None:
    return held() if isinstance(held, weakref.ref) else held


class Call:
    """One call of a module with a rule; the autograd node of its output owns it.

    Attributes:
        capture: the forward pass it belongs to.
        name: the module's name in the network.
        module: the module.
        rule: its rule.
        parameters: those of its own parameters that are trained, by their name in the module.
        couples: whether the call took statistics from the batch, as batch norms in training mode do.
        saved: what the rule saved.
        shape: of the output; of a whole call its batch alone.
        batch: length of the output's first dimension.
        output_nr: which output of the node it is.
        input_nodes: the nodes that made its inputs.
        input_storages: addresses of the memory of its inputs that no node made.
        input_is_index: whether these hold integers.
        input_sizes: how many numbers each of them holds; there only if there are some.
        producer: the call whose output was this call's input, if any; noted where the call couples.
        slot: which input of the node this call's input is; noted where the call couples.
        reads: whether the rule needs the activations again.
        options: what the module had under the names of the rule's options.
    """

    capture: Capture
    name: str
    module: nn.Module
    rule: Rule
    parameters: dict[str, nn.Parameter]
    couples: bool
    saved: Any
    shape: tuple[int, ...]
    batch: int
    output_nr: int
    input_nodes: tuple[Node, ...]
    input_storages: frozenset[int]
    input_is_index: bool
    input_sizes: frozenset[int]
    producer: Call | None
    slot: int
    reads: bool
    options: tuple[Any, ...]
    _activations: Any  # the activations, weak references to them once they are let go of, None when they are freed
    _versions: int | tuple[int | None, ...]

    # There are many calls, and they live for a step.
    __slots__ = (
        *("capture", "name", "module", "rule", "parameters", "couples", "saved", "shape", "batch", "output_nr"),
        *("input_nodes", "input_storages", "input_is_index", "input_sizes", "producer", "slot", "reads", "options"),
        *("_activations", "_versions", "__weakref__"),
    )

    def __init__(
        self, capture: Capture, name: str, module: nn.Module, rule: Rule, activations: Activations, output: Tensor
    ) -> None:
        note_call(self, Call, capture, name, module, rule, activations, output)

    def _note(
        self,
        capture: Capture,
        name: str,
        module: nn.Module,
        rule: Rule,
        shape: tuple[int, ...],
        inputs: tuple[Tensor | None, ...],
        *,
        reads: bool = False,
    ) -> None:
        """Fill in a call that couples nothing and has nothing saved."""
        self.capture, self.name, self.module, self.rule = capture, name, module, rule
        self.parameters = trained_of(module)
        self.couples, self.saved, self.producer, self.slot = False, None, None, 0
        self.shape, self.batch, self.output_nr, self.reads = shape, shape[0] if shape else 0, 0, reads
        self.options = ()
        note_inputs(self, inputs, reads)

    # -- what note_call asks for in Python --------------------------------------------------------------------

    def _save(self, activations: Activations, output: Tensor) -> Any:
        return self.rule.save(self.module, activations, output)

    def _note_given(self, given: Sequence[Tensor]) -> None:
        """Note the inputs that no node made, if there are any."""
        self.input_storages = frozenset(map(address_of, given))
        self.input_is_index = not any(t.is_floating_point() or t.is_complex() for t in given)
        self.input_sizes = frozenset([t.numel() for t in given])

    # -- for the backward pass --------------------------------------------------------------------------------

    def activations(self) -> Any:
        """The module's input, detached.

        Raises:
            RuntimeError: it was freed by an earlier backward pass, or changed in place.
        """
        kept = self._activations
        if isinstance(kept, Tensor) and version_of(kept) == self._versions:  # as almost always
            return kept.detach()
        return _each(Tensor.detach, self._checked())

    def kept(self) -> Any:
        """The module's input; None where the rule does not need it, and where it was freed or changed."""
        kept = _each(_alive, self._activations)
        known = tuple(map(_version, kept)) if isinstance(kept, tuple) else _version(kept)
        return kept if known == self._versions else None

    def _checked(self) -> Activations:
        kept = _each(_alive, self._activations)
        versions = self._versions if isinstance(self._versions, tuple) else (self._versions,)
        tensors = kept if isinstance(kept, tuple) else (kept,) * len(versions)
        if any(tensor is None and version is not None for tensor, version in zip(tensors, versions, strict=True)):
            raise RefusedError(
                f"engm: the graph of layer '{self.name}' was already backpropagated, and what it remembered is "
                "freed. Take the norms before `.backward()`, or run the forward pass again."
            )
        for tensor, version in zip(tensors, versions, strict=True):
            if tensor is not None and version_of(tensor) != version:
                raise RefusedError(
                    f"engm: the input of layer '{self.name}' was modified in place after the layer read it, so its "
                    "per-example gradient is gone. Use the out-of-place operation there."
                )
        return kept

    def by_example(self, backprops: Any) -> list[Tensor]:
        """The gradients of the outputs, detached, with the examples along the first dimension."""
        return [backprops.detach()]

    @property
    def as_called(self) -> nn.Module:
        """The module with the options that it had at the call: itself, or a copy that shares its parameters."""
        module, names = self.module, self.rule.options
        if all(getattr(module, name) == option for name, option in zip(names, self.options, strict=True)):
            return module
        module = copy.copy(module)
        vars(module).update(zip(names, self.options, strict=True))
        return module

    def release(self) -> None:
        """Let go of the activations, as whoever is done with the graph may do; whoever else holds them keeps them."""
        held = self._activations
        if isinstance(held, Tensor):  # as almost always
            self._activations = weakref.ref(held)
        elif isinstance(held, tuple):
            self._activations = _each(_weakly, held)


class NotedCall(Call):
    """A call of a module whose parameters are accounted for by operators; it accounts for nothing itself."""

    __slots__ = ()

    def __init__(
        self, capture: Capture, name: str, module: nn.Module, rule: Rule, taken: tuple[Tensor, ...], output: Tensor
    ) -> None:
        self._note(capture, name, module, rule, tuple(output.shape), taken)
        self.output_nr = output.output_nr


class WholeCall(Call):
    """A call of a module that takes and returns any nest of tensors.

    All its outputs come from one ``Tap``, whose node owns the call. ``batch`` is what the rule says it is, and the
    backprops are a tuple: a gradient or None for every leaf of the flattened output.

    Args:
        capture, name, module, rule: as in :class:`Call`.
        arguments: what the module was called with.
        leaves: how many leaves its flattened output has.
        places: which of the leaves are tapped.
        batch: number of examples, as the rule sees it.
        saved: what the rule saved.
    """

    __slots__ = ("_frame", "_leaves", "_places", "_weights")

    rule: WholeCallRule

    def __init__(
        self,
        capture: Capture,
        name: str,
        module: nn.Module,
        rule: WholeCallRule,
        arguments: Arguments,
        leaves: int,
        places: Sequence[int],
        batch: int,
        saved: Any,
    ) -> None:
        self._frame, tensors = Frame.split(arguments)
        self._note(capture, name, module, rule, (batch,), tensors, reads=True)
        self.saved = saved
        self._weights = _versions_of_parameters(module)
        self._leaves = leaves
        self._places = tuple(places)

    def arranged(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Gradients of the tapped outputs as those of all leaves."""
        arranged: list[Tensor | None] = [None] * self._leaves
        for place, gradient in zip(self._places, gradients, strict=True):
            arranged[place] = gradient
        return tuple(arranged)

    def by_example(self, backprops: Any) -> list[Tensor]:
        return [gradient.detach() for gradient in self.rule.by_example(self.module, self.saved, backprops)]

    def activations(self) -> Arguments:
        """What the module was called with, tensors detached.

        Raises:
            RuntimeError: it was freed by an earlier backward pass, or it or a parameter was changed in place.
        """
        tensors = super().activations()
        if _versions_of_parameters(self.module) != self._weights:
            raise RefusedError(
                f"engm: the parameters of layer '{self.name}' were modified or replaced after its forward pass, which "
                "has to be run again for its per-example gradients. Take the norms before the optimizer's step."
            )
        try:
            return self._frame.filled(tensors)
        except ReferenceError as error:
            raise RefusedError(
                f"engm: layer '{self.name}' cannot be run again for its per-example gradients: {error}. Pass tensors, "
                "or give the layer a rule with engm.register_rule."
            ) from None


def _versions_of_parameters(module: nn.Module) -> list[tuple[int, int]]:
    """Who the parameters of the module and of those inside are, and how often they were written into."""
    own = [p for _, part in named_modules(module) for p in own_parameters(part).values() if p is not None]
    return [(id(parameter), version_of(parameter)) for parameter in own]


class Capture:
    """One captured forward pass.

    Attributes:
        owner: the wrapper whose forward pass it was (compared by identity).
        queue: of gradients, on their way to the collector of the backward pass that runs now, if it has one.
        inputs: pairs of an input tensor as the user gave it (weakly) and the leaf put in its place.
        ranks: the processes that the pass ran among, if it did: their batches are one batch.
        input_shape: shape of the first tensor that the network was called with; empty without one, or if sequences
            were packed.
        input_storages: addresses of the memory of all tensors that it was called with.
        input_shapes: their shapes.
        packs: whether hooks packed what layers saved, as those of activation checkpointing, where a backward pass runs
            parts of the network again.
    """

    def __init__(self, owner: Wrapper) -> None:
        self.owner = owner
        self.queue: GradientQueue | None = None
        self.inputs: list[tuple[weakref.ref[Tensor], Tensor]] = []
        self.ranks: Ranks | None = None
        self.input_shape: tuple[int, ...] = ()
        self.input_storages: frozenset[int] = frozenset()
        self.input_shapes: tuple[tuple[int, ...], ...] = ()
        self.packs = False

    def note_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Remember the tensors (in any nest) that the network is called with, without keeping them."""
        packed = False
        if not kwargs and {*map(type, args)} == {Tensor}:  # as almost always
            tensors = list(args)
        else:
            leaves = tree_leaves((args, kwargs), is_leaf=_is_packed)
            packed = any(map(_is_packed, leaves))
            parts = [part for leaf in leaves for part in (leaf if _is_packed(leaf) else (leaf,))]
            tensors = [part for part in parts if isinstance(part, Tensor)]
        self.input_shape = tuple(tensors[0].shape) if tensors and not packed else ()
        self.input_storages = frozenset(map(address_of, tensors))
        self.input_shapes = tuple([tuple(tensor.shape) for tensor in tensors])

    def mark(self, outputs: Any) -> None:
        """Note in the graph behind ``outputs`` (any nest of tensors) that this was a captured forward pass."""
        for output in (outputs,) if isinstance(outputs, Tensor) else tree_leaves(outputs):
            if isinstance(output, Tensor) and output.grad_fn is not None:
                write_record(output, self, NO_GRADIENTS)


@contextmanager
def collecting(captures: Sequence[Capture], collector: Collector) -> Iterator[None]:
    """Hand the gradients of all calls of these forward passes to ``collector`` while a backward pass runs.

    It gets them in order, each soon after it is there, and all before the context is left.

    Args:
        captures: the forward passes.
        collector: takes the gradients.

    Raises:
        RuntimeError: somebody collects from one of them already.
    """
    if any(capture.queue is not None for capture in captures):
        raise RefusedError("engm: this graph is being measured already (a measurement inside a backward hook?).")
    queue = GradientQueue(collector, QUEUED_BYTES)
    try:
        for capture in captures:
            capture.queue = queue
        yield
        queue.flush()
    finally:
        for capture in captures:
            capture.queue = None


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)
