"""Captured calls: what is remembered of one call of a module, until its graph is gone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from .arguments import Arguments, Frame
from .rules import Activations, Rule, WholeCallRule
from .rules.normalization import BatchNormRule, with_constant_statistics

if TYPE_CHECKING:
    from .capture import Capture

CALLS_KEY = "engm"  # in the metadata of an autograd node


def address_of(tensor: Tensor) -> int:
    """Of the tensor's memory; 0 where there is none (inside of a function transform)."""
    try:
        return tensor.untyped_storage().data_ptr()
    except NotImplementedError:
        return 0


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """``function`` of a value, or of every item of a tuple but Nones."""
    if isinstance(value, tuple):
        return tuple(None if item is None else function(item) for item in value)
    return function(value)


class Call:
    """One call of a module with a rule. Owned by the autograd node of its output, through the node's metadata.

    Attributes:
        capture: the forward pass it belongs to.
        name: the module's name in the network.
        module: the module.
        rule: its rule.
        parameters: those of its own parameters that are trained, by their name in the module.
        couples: whether the call took statistics from the batch.
        saved: what the rule saved.
        shape: of the output; of a whole call its batch alone.
        batch: length of the output's first dimension.
        output_nr: which output of the node it is.
        hooks: handles of the hooks on its outputs.
        input_nodes: the nodes that made its inputs.
        input_storages: addresses of its inputs' memory.
        input_is_index: whether its inputs hold integers.
        producer: the call whose output was this call's input, if any.
        reads: whether the rule needs the activations again.
    """

    def __init__(
        self, capture: Capture, name: str, module: nn.Module, rule: Rule, activations: Activations, output: Tensor
    ) -> None:
        self._belongs_to(capture, name, module, rule)
        self.couples = rule.couples(module)
        self.saved: Any = self._save(activations, output) if self.parameters or self.couples else None
        self.shape = tuple(output.shape)
        self.batch = output.shape[0] if output.dim() else 0
        self.output_nr = output.output_nr
        self.producer = self._find_producer(activations) if self.couples else None
        self.reads = self.couples or (bool(self.parameters) and rule.reads_activations(tuple(self.parameters)))
        self._keep(activations)

    def _save(self, activations: Activations, output: Tensor) -> Any:
        return self.rule.save(self.module, activations, output)

    def _belongs_to(self, capture: Capture, name: str, module: nn.Module, rule: Rule) -> None:
        self.capture = capture
        self.name = name
        self.module = module
        self.rule = rule
        self.hooks: list[RemovableHandle] = []
        self.parameters = {
            key: parameter
            for key, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad
        }

    def _keep(self, activations: Activations) -> None:
        tensors = [t for t in (activations if isinstance(activations, tuple) else (activations,)) if t is not None]
        self.input_nodes = tuple(t.grad_fn for t in tensors if t.grad_fn is not None)
        self.input_storages = frozenset(map(address_of, tensors))
        self.input_is_index = not any(t.is_floating_point() or t.is_complex() for t in tensors)
        self._activations: Activations | None = activations if self.reads else None
        self._weak = _each(weakref.ref, activations)
        self._versions = _each(version_of, activations)

    @staticmethod
    def _find_producer(activations: Activations) -> Call | None:
        if isinstance(activations, tuple) or activations.grad_fn is None:
            return None
        node: Any = activations.grad_fn
        calls = node.metadata.get(CALLS_KEY, [])
        return next((call for call in calls if call.output_nr == activations.output_nr), None)

    def put_hook_last(self) -> None:
        """Let hooks that the user put on the output go first: the gradient that they return is the one that counts."""
        for handle in self.hooks:
            hooks = handle.hooks_dict_ref()
            if hooks is not None and len(hooks) > 1:
                hooks[handle.id] = hooks.pop(handle.id)

    def on_backprop(self, backprops: Any) -> None:
        """Tensor hook: hand the gradient of the output to the session; in any other backward pass, let go.

        A backward pass that frees the graph has no more use for the activations either.
        """
        session = self.capture.session
        if session is not None:
            if backprops is not None:  # None: something downstream passes no gradient on
                session.receive(self, backprops)
        elif not torch._C._autograd._get_current_graph_task_keep_graph():
            self._activations = None

    def activations(self) -> Any:
        """The module's input, detached.

        Raises:
            RuntimeError: it was freed by an earlier backward pass, or changed in place.
        """
        return _each(Tensor.detach, self._checked())

    def _checked(self) -> Activations:
        kept = self._activations if self._activations is not None else _each(lambda reference: reference(), self._weak)
        tensors, versions = (value if isinstance(value, tuple) else (value,) for value in (kept, self._versions))
        for tensor, version in zip(tensors, versions, strict=True):
            if version is None:  # no tensor
                continue
            if tensor is None:
                raise RuntimeError(
                    f"engm: the graph of layer '{self.name}' was already backpropagated, and what it remembered is "
                    "freed. Take the norms before `.backward()`, or run the forward pass again."
                )
            if version_of(tensor) != version:
                raise RuntimeError(
                    f"engm: the input of layer '{self.name}' was modified in place after the layer read it, so its "
                    "per-example gradient is gone. Use the out-of-place operation there."
                )
        return kept

    def by_example(self, backprops: Any) -> list[Tensor]:
        """The gradients of the outputs, detached, with the examples along the first dimension."""
        return [backprops.detach()]

    def release(self) -> None:
        """Drop the activations: whoever calls this is done with the graph."""
        self._activations = None

    def freeze_statistics(
        self, slot: int, grad_inputs: tuple[Any, ...], grad_outputs: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """Node hook of a batch norm: in a frozen pass its input gradient is ``scale / sigma * gy`` (design 2.5).

        Args:
            slot: which of the node's inputs is the layer's.
            grad_inputs: gradients of the node's inputs.
            grad_outputs: gradients of its outputs.
        """
        if not self.capture.frozen:
            return None
        return with_constant_statistics(grad_inputs, slot, grad_outputs[self.output_nr], self.gain())

    def gain(self) -> Tensor:
        """``scale / sigma`` of a batch norm, ``[C]``."""
        _, rstd = self.saved
        weight = self.module._parameters.get("weight")
        return rstd if weight is None else rstd * weight.detach()

    @property
    def is_batch_norm(self) -> bool:
        """Whether the rule of batch normalisation made this call."""
        return isinstance(self.rule, BatchNormRule)


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
        self.output_nr = 0
        self.batch = batch
        self.shape = (batch,)
        self.saved = saved
        self._frame, tensors = Frame.split(arguments)
        self._keep(tensors)
        self._weights = [(id(parameter), parameter._version) for parameter in module.parameters()]
        self._places = tuple(places)
        self._arrived: list[Tensor | None] = [None] * leaves

    def on_output(self, number: int, backprops: Tensor | None) -> None:
        """Tensor hook of one output. Autograd calls those of all outputs in turn, with None where nothing came."""
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
        if [(id(parameter), parameter._version) for parameter in self.module.parameters()] != self._weights:
            raise RuntimeError(
                f"engm: the parameters of layer '{self.name}' were modified or replaced after its forward pass, which "
                "has to be run again for its per-example gradients. Take the norms before the optimizer's step."
            )
        try:
            return self._frame.filled(tensors)
        except ReferenceError as error:
            raise RuntimeError(
                f"engm: layer '{self.name}' cannot be run again for its per-example gradients: {error}. Pass tensors, "
                "or give the layer a rule with engm.register_rule."
            ) from None


def version_of(tensor: Tensor) -> int:
    """Changes with every in-place operation on the tensor; those made in inference mode do not count them."""
    return 0 if tensor.is_inference() else tensor._version


def slot_of(node: Any, activations: Any) -> int:
    """Which input of a node a layer's input is: the first of an operator's, any of a compiled region's."""
    if isinstance(activations, Tensor) and activations.requires_grad:
        edge = get_gradient_edge(activations)
        for slot, (child, number) in enumerate(node.next_functions):
            if child == edge.node and number == edge.output_nr:
                return slot
    return 0  # cast on the way, or no gradient goes there
