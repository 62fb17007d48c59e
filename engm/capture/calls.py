"""Captured calls: what is remembered of one call of a module, and of one forward pass, until the graph is gone.

A call is written into the metadata of the autograd node of its output, and a forward pass into the metadata of the
nodes of its outputs. So both live exactly as long as the graph that they belong to, whatever else the user does with
the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..checks import RefusedError
from ..distributed import Ranks
from ..rules import Activations, Rule, WholeCallRule
from ..rules.arguments import Arguments, Frame
from ..torch_internals import (
    HungHook,
    Node,
    address_of,
    graph_is_kept,
    hung_by_others,
    own_parameters,
    put_last,
    shape_of,
    slot_of,
    trained_of,
    tree_leaves,
    version_of,
)
from .layers import named_modules

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CALLS_KEY = "engm"  # in the metadata of an autograd node
CAPTURES_KEY = "engm captures"


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


class Call:
    """One call of a module with a rule; the autograd node of its output owns it, through the node's metadata.

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
        hooks: the hooks on its outputs.
        input_nodes: the nodes that made its inputs.
        input_storages: addresses of the memory of its inputs that no node made.
        input_is_index: whether these hold integers.
        producer: the call whose output was this call's input, if any; noted where the call couples.
        slot: which input of the node this call's input is; noted where the call couples.
        reads: whether the rule needs the activations again.
    """

    def __init__(
        self, capture: Capture, name: str, module: nn.Module, rule: Rule, activations: Activations, output: Tensor
    ) -> None:
        self._belongs_to(capture, name, module, rule)
        self.couples = rule.couples(module)
        self.saved: Any = self._save(activations, output) if self.parameters or self.couples else None
        self.shape: tuple[int, ...] = shape_of(output)
        self.batch = self.shape[0] if self.shape else 0
        self.output_nr = output.output_nr
        self.producer = self._find_producer(activations) if self.couples else None
        self.slot = slot_of(output.grad_fn, activations) if self.couples else 0
        self.reads = self.couples or (bool(self.parameters) and rule.reads_activations(tuple(self.parameters)))
        self._keep(activations)

    def _save(self, activations: Activations, output: Tensor) -> Any:
        return self.rule.save(self.module, activations, output)

    def _belongs_to(self, capture: Capture, name: str, module: nn.Module, rule: Rule) -> None:
        self.capture = capture
        self.name = name
        self.module = module
        self.rule = rule
        self.hooks: list[HungHook] = []
        self.parameters = trained_of(module)

    def _keep(self, activations: Activations) -> None:
        tensors = activations if isinstance(activations, tuple) else (activations,)
        self.input_nodes: list[Node] = []
        given = []
        for tensor in tensors:
            if tensor is not None:
                node = tensor.grad_fn
                if node is None:
                    given.append(tensor)
                else:
                    self.input_nodes.append(node)
        self.input_storages = frozenset(map(address_of, given)) if given else frozenset()
        self.input_is_index = bool(given) and not any(t.is_floating_point() or t.is_complex() for t in given)
        self._activations: Activations | None = activations if self.reads else None
        if isinstance(activations, Tensor):
            self._weak, self._versions = weakref.ref(activations), version_of(activations)
        else:
            self._weak, self._versions = _each(weakref.ref, activations), _each(version_of, activations)

    @staticmethod
    def _find_producer(activations: Activations) -> Call | None:
        if isinstance(activations, tuple) or activations.grad_fn is None:
            return None
        node: Any = activations.grad_fn
        calls = node.metadata.get(CALLS_KEY, [])
        return next((call for call in calls if call.output_nr == activations.output_nr), None)

    def put_hook_last(self) -> None:
        """Let hooks that the user put on the output go first: the gradient that they return is the one that counts."""
        for hung in self.hooks:
            put_last(hung)

    def on_backprop(self, backprops: Any) -> None:
        """Tensor hook: hand the gradient of the output to the collector; in any other backward pass, let go.

        A backward pass that frees the graph has no more use for the activations either.
        """
        collector = self.capture.collector
        if collector is not None:
            if backprops is not None:  # None: something downstream passes no gradient on
                collector.receive(self, backprops)
        elif not graph_is_kept():
            self._activations = None

    def activations(self) -> Any:
        """The module's input, detached.

        Raises:
            RuntimeError: it was freed by an earlier backward pass, or changed in place.
        """
        kept = self._activations
        if isinstance(kept, Tensor) and version_of(kept) == self._versions:  # as almost always
            return kept.detach()
        return _each(Tensor.detach, self._checked())

    def _checked(self) -> Activations:
        kept = self._activations if self._activations is not None else _each(lambda reference: reference(), self._weak)
        tensors, versions = (value if isinstance(value, tuple) else (value,) for value in (kept, self._versions))
        for tensor, version in zip(tensors, versions, strict=True):
            if version is None:  # no tensor
                continue
            if tensor is None:
                raise RefusedError(
                    f"engm: the graph of layer '{self.name}' was already backpropagated, and what it remembered is "
                    "freed. Take the norms before `.backward()`, or run the forward pass again."
                )
            if version_of(tensor) != version:
                raise RefusedError(
                    f"engm: the input of layer '{self.name}' was modified in place after the layer read it, so its "
                    "per-example gradient is gone. Use the out-of-place operation there."
                )
        return kept

    def by_example(self, backprops: Any) -> list[Tensor]:
        """The gradients of the outputs, detached, with the examples along the first dimension."""
        return [backprops.detach()]

    def release(self) -> None:
        """Drop the activations, as whoever is done with the graph may do."""
        self._activations = None


class NotedCall(Call):
    """A call of a module whose parameters are accounted for by operators; it accounts for nothing itself."""

    def __init__(
        self, capture: Capture, name: str, module: nn.Module, rule: Rule, taken: tuple[Tensor, ...], output: Tensor
    ) -> None:
        self._belongs_to(capture, name, module, rule)
        self.couples = self.reads = False
        self.saved = self.producer = None
        self.shape = tuple(output.shape)
        self.batch = output.shape[0] if output.dim() else 0
        self.output_nr, self.slot = output.output_nr, 0
        self._keep(taken)


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
        self._belongs_to(capture, name, module, rule)
        self.couples = False
        self.reads = True
        self.producer = None
        self.slot = 0
        self.output_nr = 0
        self.batch = batch
        self.shape = (batch,)
        self.saved = saved
        self._frame, tensors = Frame.split(arguments)
        self._keep(tensors)
        self._weights = _versions_of_parameters(module)
        self._places = tuple(places)
        self._arrived: list[Tensor | None] = [None] * leaves

    def on_output(self, number: int, backprops: Tensor | None) -> None:
        """Tensor hook of one output. Autograd calls those of all outputs in turn, with None where no gradient came."""
        if number == 0:
            self._arrived = [None] * len(self._arrived)
        self._arrived[self._places[number]] = backprops
        if number + 1 == len(self._places):
            arrived, self._arrived = tuple(self._arrived), [None] * len(self._arrived)
            self.on_backprop(arrived if any(gradient is not None for gradient in arrived) else None)

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
        collector: what the backward pass that runs now hands gradients to, if anything.
        inputs: pairs of an input tensor as the user gave it (weakly) and the leaf put in its place.
        ranks: the processes that the pass ran among, if it did: their batches are one batch.
        input_shape: shape of the first tensor that the network was called with; empty without one, or if sequences
            were packed.
        input_storages: addresses of the memory of all tensors that it was called with.
        hooks_before: how many hooks others had hung when it began, see :func:`engm.torch_internals.hung_by_others`.
    """

    def __init__(self, owner: Wrapper) -> None:
        self.owner = owner
        self.hooks_before = hung_by_others()
        self.collector: Collector | None = None
        self.inputs: list[tuple[weakref.ref[Tensor], Tensor]] = []
        self.ranks: Ranks | None = None
        self.input_shape: tuple[int, ...] = ()
        self.input_storages: frozenset[int] = frozenset()

    def note_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Remember the tensors (in any nest) that the network is called with, without keeping them."""
        bare = not kwargs and all(type(value) is Tensor for value in args)
        leaves = args if bare else tree_leaves((args, kwargs), is_leaf=_is_packed)
        packed = any(map(_is_packed, leaves))
        parts = [part for leaf in leaves for part in (leaf if _is_packed(leaf) else (leaf,))]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        self.input_shape = tuple(tensors[0].shape) if tensors and not packed else ()
        self.input_storages = frozenset(map(address_of, tensors))

    def mark(self, outputs: Any) -> None:
        """Note in the graph behind ``outputs`` (any nest of tensors) that this was a captured forward pass."""
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor) and output.grad_fn is not None:
                node: Any = output.grad_fn
                node.metadata.setdefault(CAPTURES_KEY, []).append(self)


@contextmanager
def collecting(captures: Sequence[Capture], calls: Iterable[Call], collector: Collector) -> Iterator[None]:
    """Hand the gradients of all calls of these forward passes to ``collector`` while a backward pass runs.

    Args:
        captures: the forward passes.
        calls: their calls in the graph that is backpropagated.
        collector: takes the gradients.

    Raises:
        RuntimeError: somebody collects from one of them already.
    """
    if any(capture.collector is not None for capture in captures):
        raise RefusedError("engm: this graph is being measured already (a measurement inside a backward hook?).")
    for call in calls:
        call.put_hook_last()
    try:
        for capture in captures:
            capture.collector = collector
        yield
    finally:
        for capture in captures:
            capture.collector = None


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)
