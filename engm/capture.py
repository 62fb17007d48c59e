"""Captured calls: what a wrapped model remembers of its own forward pass, and for how long.

Hooks are put on the modules for the duration of one captured forward pass and taken off again, so the user's
network never carries anything of ours between calls: it can be copied, pickled, scripted or called directly.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .rules import FunctionRule, Rule
from .rules.normalization import BatchNormRule

if TYPE_CHECKING:
    from .distributed import Ranks
    from .session import Session

CALLS_KEY = "engm"  # in the metadata of an autograd node
CAPTURES_KEY = "engm captures"


class Capture:
    """One captured forward pass.

    Attributes:
        owner: the wrapper whose forward pass it was (compared by identity).
        session: the backward pass that presently collects from it, if any.
        frozen: while True, batch norms of this pass treat their statistics as constants in the backward pass.
        inputs: pairs of an input tensor as the user gave it (weakly) and the leaf put in its place.
        ranks: the processes that the pass ran among, if it did: their batches are one batch.
        input_shape: shape of the first tensor that the network was called with; empty without one.
        input_storages: addresses of the memory of all tensors that it was called with.
    """

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.session: Session | None = None
        self.frozen = False
        self.inputs: list[tuple[weakref.ref[Tensor], Tensor]] = []
        self.ranks: Ranks | None = None
        self.input_shape: tuple[int, ...] = ()
        self.input_storages: frozenset[int] = frozenset()

    def note_inputs(self, inputs: Any) -> None:
        """Remember the tensors (in any nest) that the network is called with, without keeping them."""
        tensors = [value for value in tree_leaves(inputs) if isinstance(value, Tensor)]
        self.input_shape = tuple(tensors[0].shape) if tensors else ()
        self.input_storages = frozenset(value.untyped_storage().data_ptr() for value in tensors)

    def mark(self, outputs: Any) -> None:
        """Note in the graph behind ``outputs`` (any nest of tensors) that this was a captured forward pass."""
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor) and output.grad_fn is not None:
                node: Any = output.grad_fn
                node.metadata.setdefault(CAPTURES_KEY, []).append(self)

    @contextmanager
    def hooked(self, plan: list[tuple[str, nn.Module, Rule]]) -> Iterator[None]:
        """Record the calls of the planned modules in this thread, first among their forward hooks."""
        thread = threading.get_ident()
        handles = []
        try:
            for name, module, rule in plan:
                hook = self._hook(name, rule, thread)
                handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, rule: Rule, thread: int) -> Callable[..., Tensor | None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> Tensor | None:
            # A hook of another thread, taken off meanwhile, may be called without kwargs; hence the default.
            if threading.get_ident() != thread or not torch.is_grad_enabled():
                return None
            activations = rule.activations(args, kwargs)
            if not isinstance(output, Tensor) or not isinstance(activations, Tensor):
                raise RuntimeError(
                    f"engm: layer '{name}' ({type(module).__name__}) must take and return one tensor to have "
                    f"per-example gradients, it took {type(activations).__name__} and returned {type(output).__name__}."
                )
            replaced = None
            if output._is_view():
                # An in-place operation on a view rewrites the history of its base, and the node noted here would
                # drop out of the graph. The same tensor, not tracked as a view, has no such trouble; a user's layer may
                # have saved what it returns, which must not change unnoticed, so there it is a copy.
                plain = isinstance(rule, FunctionRule)
                output = replaced = output.clone() if plain else torch.ops.aten._unsafe_view(output, output.shape)
            node = output.grad_fn
            if node is None:  # nothing here is trained
                return None
            if activations is output:  # changed in place; the tensor itself would keep its own graph alive
                activations = activations.detach()
            call = Call(self, name, module, rule, activations, output)
            calls = node.metadata.setdefault(CALLS_KEY, [])
            calls.append(call)
            call.hook = output.register_hook(call.on_backprop)
            if call.couples:
                node.register_hook(call.freeze_statistics)
            return replaced

        return record


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
        batch: length of the output's first dimension.
        output_nr: which output of the node it is.
        hook: handle of the hook on its output.
        input_node: the node that made its input, if any.
        input_storage: address of the input's memory.
        input_is_index: whether the input holds integers.
        producer: the call whose output was this call's input, if any.
        reads: whether the rule needs the activations again.
    """

    def __init__(
        self, capture: Capture, name: str, module: nn.Module, rule: Rule, activations: Tensor, output: Tensor
    ) -> None:
        self.capture = capture
        self.name = name
        self.module = module
        self.rule = rule
        self.parameters = {
            key: parameter
            for key, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad
        }
        self.couples = rule.couples(module)
        self.saved: Any = rule.save(module, activations, output) if self.parameters or self.couples else None
        self.batch = output.shape[0] if output.dim() else 0
        self.output_nr = output.output_nr
        self.hook: RemovableHandle | None = None
        self.input_node = activations.grad_fn
        self.input_storage = activations.untyped_storage().data_ptr()
        self.input_is_index = not (activations.is_floating_point() or activations.is_complex())
        self.producer = self._find_producer(activations) if self.couples else None
        self.reads = self.couples or (bool(self.parameters) and rule.reads_activations(tuple(self.parameters)))
        self._activations: Tensor | None = activations if self.reads else None
        self._weak = weakref.ref(activations)
        self._version = activations._version

    @staticmethod
    def _find_producer(activations: Tensor) -> Call | None:
        if activations.grad_fn is None:
            return None
        node: Any = activations.grad_fn
        calls = node.metadata.get(CALLS_KEY, [])
        return next((call for call in calls if call.output_nr == activations.output_nr), None)

    def put_hook_last(self) -> None:
        """Let hooks that the user put on the output go first: the gradient that they return is the one that counts."""
        hooks = None if self.hook is None else self.hook.hooks_dict_ref()
        if self.hook is not None and hooks is not None and len(hooks) > 1:
            hooks[self.hook.id] = hooks.pop(self.hook.id)

    def on_backprop(self, backprops: Tensor | None) -> None:
        """Tensor hook: hand the gradient of the output to the session; in any other backward pass, let go.

        A backward pass that frees the graph has no more use for the activations either.
        """
        session = self.capture.session
        if session is not None:
            if backprops is not None:  # None: something downstream passes no gradient on
                session.receive(self, backprops)
        elif not torch._C._autograd._get_current_graph_task_keep_graph():
            self._activations = None

    def activations(self) -> Tensor:
        """The module's input, detached.

        Raises:
            RuntimeError: it was freed by an earlier backward pass, or changed in place.
        """
        activations = self._activations if self._activations is not None else self._weak()
        if activations is None:
            raise RuntimeError(
                f"engm: the graph of layer '{self.name}' was already backpropagated, and what it remembered is freed. "
                "Take the norms before `.backward()`, or run the forward pass again."
            )
        if activations._version != self._version:
            raise RuntimeError(
                f"engm: the input of layer '{self.name}' was modified in place after the layer read it, so its "
                "per-example gradient is gone. Use the out-of-place operation there."
            )
        return activations.detach()

    def release(self) -> None:
        """Drop the activations: whoever calls this is done with the graph."""
        self._activations = None

    def freeze_statistics(self, grad_inputs: tuple[Any, ...], grad_outputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Node hook of a batch norm: in a frozen pass its input gradient is ``scale / sigma * gy`` (design 2.5)."""
        if not self.capture.frozen or grad_inputs[0] is None:
            return None
        gain = self.gain()
        gy = grad_outputs[0]
        shape = [1, -1] + [1] * (gy.dim() - 2)
        return ((gy * gain.view(shape)).to(grad_inputs[0].dtype), *grad_inputs[1:])

    def gain(self) -> Tensor:
        """``scale / sigma`` of a batch norm, ``[C]``."""
        _, rstd = self.saved
        weight = self.module._parameters.get("weight")
        return rstd if weight is None else rstd * weight.detach()

    @property
    def is_batch_norm(self) -> bool:
        """Whether the rule of batch normalisation made this call."""
        return isinstance(self.rule, BatchNormRule)
