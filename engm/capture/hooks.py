"""Hooks that record the calls of a network's layers during one captured forward pass.

The hooks are put on the modules for the duration of one captured forward pass and taken off again, so the user's
network never carries anything of ours between calls: it can be copied, pickled, scripted or called directly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._C import ALL_GRADIENTS, NO_GRADIENTS, CallRecorder, write_record
from ..checks import RefusedError
from ..rules import FunctionRule, Rule, WholeCallRule
from ..rules.arguments import Arguments
from ..torch_internals import (
    FirstForwardHooks,
    first_global_forward_hook,
    in_operator_of_graphs,
    is_view,
    selective_checkpoint,
    some_global_forward_hook,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)
from .calls import Call, Capture, NotedCall, WholeCall

Before = Callable[..., None]
Record = Callable[..., Any]
Adapter = Callable[..., tuple[Before | None, Record]]


def hooked(
    capture: Capture, layers: Sequence[tuple[str, nn.Module, Rule]], adapt: Adapter | None = None
) -> AbstractContextManager[None]:
    """Record the calls of ``layers`` in this thread, first among their forward hooks, while the context is open.

    Args:
        capture: the forward pass that the calls belong to.
        layers: name, module and rule of each.
        adapt: gives hooks to use instead, where the network may be compiled.
    """
    thread = threading.get_ident()
    befores: list[tuple[nn.Module, Before]] = []
    records: dict[nn.Module, Record] = {}
    for name, module, rule in layers:
        before: Before | None = None
        if rule.generic and adapt is None:
            record = _note_hook(capture, name, rule, thread)
        elif isinstance(rule, WholeCallRule):
            before, record = _whole_call_hooks(capture, name, rule, thread)
        else:
            record = _call_hook(CallRecorder(capture, name, rule, Call, _refuse, isinstance(rule, FunctionRule)))
        if adapt is not None:
            before, record = adapt(before, record, name, module, rule)
        if before is not None:
            befores.append((module, before))
        records[module] = record
    hooks = FirstForwardHooks(records)
    everywhere = some_global_forward_hook()
    return _with_others(befores, records if everywhere else None, hooks) if befores or everywhere else hooks


@contextmanager
def _with_others(
    befores: Sequence[tuple[nn.Module, Before]], records: dict[nn.Module, Record] | None, hooks: FirstForwardHooks
) -> Iterator[None]:
    """Forward pre-hooks of modules; and a hook for all modules in place of ``hooks``, if ``records`` are given."""
    handles: list[RemovableHandle] = []
    try:
        for module, before in befores:
            handles.append(module.register_forward_pre_hook(before))
        if records is None:
            with hooks:
                yield
        else:
            handles.append(_before_all_hooks(records))
            yield
    finally:
        for handle in handles:
            handle.remove()


def _call_hook(recorder: CallRecorder) -> Record:
    """A forward hook for a module that takes and returns one tensor."""

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> Tensor | None:
        # A hook of another thread, taken off meanwhile, may be called without kwargs; hence the default.
        if torch.compiler.is_dynamo_compiling() and in_operator_of_graphs():
            return None
        return recorder(module, args, kwargs, output)

    return record


def _refuse(name: str, module: nn.Module, activations: Any, output: Any) -> None:
    """Look at an unusual call of a module that should take and return one tensor (or take a tuple of several).

    Raises:
        RuntimeError: the call cannot be recorded.
    """
    several = isinstance(activations, tuple) and any(isinstance(item, Tensor) for item in activations)
    if not isinstance(output, Tensor) or not (several or isinstance(activations, Tensor)):
        raise RefusedError(
            f"engm: layer '{name}' ({type(module).__name__}) must take and return one tensor to have "
            f"per-example gradients, it took {type(activations).__name__} and returned {type(output).__name__}."
        )
    _refuse_selective_checkpoint(name, module)


def _note_hook(capture: Capture, name: str, rule: Rule, thread: int) -> Record:
    """A forward hook for a module whose parameters are accounted for by operators: it notes what the module read."""

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> None:
        if in_operator_of_graphs() or threading.get_ident() != thread or not torch.is_grad_enabled():
            return
        _refuse_selective_checkpoint(name, module)
        taken = tuple(leaf for leaf in Arguments(args, kwargs or {}).flattened[0] if isinstance(leaf, Tensor))
        given = _some_with_node(output)
        if taken and given is not None:
            write_record(given, NotedCall(capture, name, module, rule, taken, given), NO_GRADIENTS)

    return record


def _some_with_node(output: Any) -> Tensor | None:
    """A tensor of any nest that a node made: one of a tuple's own, if there is one, which is quickly found."""
    outermost = output if type(output) is tuple else (output,)
    found = next(filter(_has_node, outermost), None)
    return next(filter(_has_node, tree_leaves(output)), None) if found is None else found


def _has_node(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def _whole_call_hooks(capture: Capture, name: str, rule: WholeCallRule, thread: int) -> tuple[Before, Record]:
    """A forward pre-hook and a forward hook for a module that takes and returns any nest of tensors."""
    prepared: list[Any] = []  # more than one entry where a module calls itself

    def prepare(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not in_operator_of_graphs() and threading.get_ident() == thread and torch.is_grad_enabled():
            prepared.append(rule.before(module))

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> Any:
        if in_operator_of_graphs() or threading.get_ident() != thread or not torch.is_grad_enabled():
            return None
        before = prepared.pop() if prepared else None
        arguments = Arguments(args, kwargs)
        leaves, spec = tree_flatten(output)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        batch = rule.batch(module, arguments, leaves) if places else 0
        if batch == 0:  # nothing here is trained, or nothing of it is about the examples
            return None
        _refuse_selective_checkpoint(name, module)
        saved = rule.save_call(module, name, arguments, leaves, before)
        call = WholeCall(capture, name, module, rule, arguments, len(leaves), places, batch, saved)
        for place, tapped in zip(places, Tap.apply(*(_unviewed(leaves[p], rule) for p in places)), strict=True):
            leaves[place] = tapped
        write_record(leaves[places[0]], call, ALL_GRADIENTS)
        return tree_unflatten(leaves, spec)

    return prepare, record


def _refuse_selective_checkpoint(name: str, module: nn.Module) -> None:
    """A layer must not run where torch gets one backward pass alone right: it takes two to tell whose a row is.

    Raises:
        RuntimeError: it does; names the layer, and says what to do.
    """
    if selective_checkpoint():
        raise RefusedError(
            f"engm: layer '{name}' ({type(module).__name__}) runs in a selective checkpoint (context_fn), through "
            "which torch allows one backward pass, and it takes several to measure which rows belong to which example. "
            "Leave context_fn out."
        )


class Tap(torch.autograd.Function):
    """Hands tensors on as they are, so that one node of the graph gets the gradients of all of them."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        # Detached, not as they are: autograd would call those views, and forbid in-place operations on them.
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return tangents


def _unviewed(output: Tensor, rule: Rule) -> Tensor:
    """An output to tap; a copy of a view of which somebody else may hold the base.

    In-place operations on a tapped view would not show in its base. The layers with a rule of their own hand out views
    of tensors that nobody else sees, so theirs are tapped as they are.
    """
    return output.clone() if rule.generic and is_view(output) else output


def _before_all_hooks(records: dict[nn.Module, Record]) -> RemovableHandle:
    """A hook for all modules that runs first: those of the user run before a module's own, and may replace outputs."""

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> Any:
        own = records.get(module)
        return None if own is None else own(module, args, kwargs, output)

    return first_global_forward_hook(record)
