"""Captured calls: what a wrapped model remembers of its own forward pass, and for how long.

Hooks are put on the modules for the duration of one captured forward pass and taken off again, so the user's
network never carries anything of ours between calls: it can be copied, pickled, scripted or called directly.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, register_module_forward_hook
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.hooks import RemovableHandle

from .arguments import Arguments
from .calls import CALLS_KEY, Call, WholeCall, address_of, slot_of
from .rules import FunctionRule, Rule, WholeCallRule

if TYPE_CHECKING:
    from .distributed import Ranks
    from .session import Session

Adapter = Callable[..., tuple[Callable[..., None] | None, Callable[..., Any]]]

CAPTURES_KEY = "engm captures"


class Capture:
    """One captured forward pass.

    Attributes:
        owner: the wrapper whose forward pass it was (compared by identity).
        session: the backward pass that presently collects from it, if any.
        frozen: while True, batch norms of this pass treat their statistics as constants in the backward pass.
        inputs: pairs of an input tensor as the user gave it (weakly) and the leaf put in its place.
        ranks: the processes that the pass ran among, if it did: their batches are one batch.
        input_shape: shape of the first tensor that the network was called with; empty without one, or if sequences
            were packed.
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
        leaves = tree_leaves(inputs, is_leaf=_is_packed)
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
    def hooked(self, plan: list[tuple[str, nn.Module, Rule]], adapt: Adapter | None = None) -> Iterator[None]:
        """Record the calls of the planned modules in this thread, first among their forward hooks.

        Args:
            plan: name, module and rule of each.
            adapt: gives hooks to use instead, where the network may be compiled.
        """
        thread = threading.get_ident()
        handles = []
        records = {}
        try:
            for name, module, rule in plan:
                before: Callable[..., None] | None = None
                if isinstance(rule, WholeCallRule):
                    before, hook = self._whole_call_hooks(name, rule, thread)
                else:
                    hook = self._hook(name, rule, thread)
                if adapt is not None:
                    before, hook = adapt(before, hook, name, module, rule)
                if before is not None:
                    handles.append(module.register_forward_pre_hook(before))
                records[module] = hook
            if _global_forward_hooks:
                handles.append(_before_all_hooks(records))
            else:
                for module, record in records.items():
                    handles.append(module.register_forward_hook(record, prepend=True, with_kwargs=True))
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
            several = isinstance(activations, tuple) and any(isinstance(item, Tensor) for item in activations)
            if not isinstance(output, Tensor) or not (several or isinstance(activations, Tensor)):
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
            call.hooks.append(output.register_hook(call.on_backprop))
            if call.couples:
                node.register_hook(partial(call.freeze_statistics, slot_of(node, activations)))
            return replaced

        return record

    def _whole_call_hooks(
        self, name: str, rule: WholeCallRule, thread: int
    ) -> tuple[Callable[..., None], Callable[..., Any]]:
        """A forward pre-hook and a forward hook for a module that takes and returns any nest of tensors."""
        prepared: list[Any] = []  # more than one entry where a module calls itself

        def prepare(module: nn.Module, args: tuple[Any, ...]) -> None:
            if threading.get_ident() == thread and torch.is_grad_enabled():
                prepared.append(rule.before(module))

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> Any:
            if threading.get_ident() != thread or not torch.is_grad_enabled():
                return None
            before = prepared.pop() if prepared else None
            arguments = Arguments(args, kwargs)
            leaves, spec = tree_flatten(output)
            places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
            batch = rule.batch(module, arguments, leaves) if places else 0
            if batch == 0:  # nothing here is trained, or nothing of it is about the examples
                return None
            saved = rule.save_call(module, name, arguments, leaves, before)
            call = WholeCall(self, name, module, rule, arguments, len(leaves), places, batch, saved)
            for place, tapped in zip(places, Tap.apply(*(_unviewed(leaves[p], rule) for p in places)), strict=True):
                leaves[place] = tapped
            node = leaves[places[0]].grad_fn
            node.metadata.setdefault(CALLS_KEY, []).append(call)
            for number, place in enumerate(places):
                call.hooks.append(leaves[place].register_hook(partial(call.on_output, number)))
            return tree_unflatten(leaves, spec)

        return prepare, record


class Tap(torch.autograd.Function):
    """Hands tensors on as they are, so that one node of the graph gets the gradients of all of them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        # Detached, not as they are: autograd would call those views, and forbid in-place operations on them.
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return tangents


def _unviewed(output: Tensor, rule: Rule) -> Tensor:
    """An output to tap. In-place operations on a tapped view would not show in its base, so it is a copy.

    The layers with a rule of their own hand out views of tensors that nobody else sees.
    """
    return output.clone() if rule.generic and output._is_view() else output


def _before_all_hooks(records: dict[nn.Module, Callable[..., Any]]) -> RemovableHandle:
    """A hook for all modules that runs first: those of the user run before a module's own, and may replace outputs."""

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> Any:
        own = records.get(module)
        return None if own is None else own(module, args, kwargs, output)

    handle = register_module_forward_hook(record, with_kwargs=True)
    cast(OrderedDict[int, Any], _global_forward_hooks).move_to_end(handle.id, last=False)
    return handle


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)
