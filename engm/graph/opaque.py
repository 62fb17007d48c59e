"""Functions of the user's that gradients run through: do they treat every example's gradient apart, now as before?

A plan is measured on one graph, and holds for others because operators treat all gradients alike. A
``torch.autograd.Function`` may not: one that clips a gradient by its norm over the batch makes the examples influence
each other as soon as it bites, and one that moves rows by what it does not show may move them elsewhere. So in every
later pass its backward is run once more, on gradients that have a random factor for every example, and has to hand on
what it did, multiplied by the same factors.

Nor may it hide what it trains: a backward that runs a backward pass of its own, as reversible networks and checkpoints
written by hand do, leaves gradients in ``.grad`` that no pass through the graph ever sees.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..capture.calls import Call
from ..checks import RefusedError
from ..rules.entries import owners_of
from ..terms.layout import Layout
from ..terms.owners import Ownership
from ..torch_internals import (
    Node,
    constant,
    entering_shape,
    is_compiled_region,
    is_opaque,
    is_recomputed,
    is_sync_batch_norm,
    node_name,
    node_outputs,
    operator_name,
    passed_to_inputs,
    unrecorded,
)
from .owners import NARROW_TOLERANCE, TOLERANCE, dense
from .plan import OpaqueFunction
from .routing import HANDING_ON
from .structure import Structure
from .trace import Trace

# Of torch's own, which puts a module's backward hooks into the graph and hands gradients on.
FOR_HOOKS = "BackwardHookFunction"


Arranging = Callable[[int, int], Ownership | None]
"""``(position, number of the output) -> where the examples lie``; None where that is not known."""


def opaque_functions(
    traced: Trace, structure: Structure, arrangement: Arranging, skip: Collection[int]
) -> tuple[list[OpaqueFunction], bool]:
    """The functions of the user's on the way to the parameters, and whether all of them can be watched.

    Args:
        traced: the graph.
        structure: what it tells by itself.
        arrangement: of what nodes made.
        skip: nodes (positions) and leaves (numbers) that nothing of single examples goes through.
    """
    found: list[OpaqueFunction] = []
    for position, node in enumerate(traced.order):
        if position in skip or not is_users(node):
            continue
        slots = [
            slot
            for slot, child in enumerate(traced.children[position])
            if child is not None and child >= 0 and child not in skip and structure.trains[child]
        ]
        if not slots:
            continue
        if position in structure.inner or is_recomputed(node) or None in traced.shapes[position]:
            return [], False
        inputs: dict[int, Ownership] = {}
        for slot in slots:
            child = traced.children[position][slot]
            assert child is not None
            where = arrangement(child, node.next_functions[slot][1])
            if where is None:
                return [], False
            inputs[slot] = where
        outputs = tuple(arrangement(position, number) for number in range(len(node_outputs(node))))
        found.append(OpaqueFunction(position, outputs, inputs))
    return found, True


def is_users(node: Node) -> bool:
    """Whether the backward of a node is the user's own."""
    if not is_opaque(node) or is_compiled_region(node) or is_sync_batch_norm(node):
        return False
    return operator_name(node) not in HANDING_ON and operator_name(node) != FOR_HOOKS


def refuse_hidden_passes(traced: Trace, losses: Tensor, seed: float) -> None:
    """Run the backward of every function of the user's once: none may train what the graph does not show.

    Under ``fully_shard`` nothing is looked for, since functions of torch's own leave gradients there.

    Args:
        traced: the graph.
        losses: ``[n]``.
        seed: what the losses are multiplied by.

    Raises:
        RuntimeError: a function left gradients in ``.grad`` of trained parameters, which is as it was again.
    """
    if traced.owner is not None and traced.owner.shard_group is not None:
        return
    behind: list[GradientEdge] = []  # a pass to what a function hands gradients to runs the function
    for node, children in zip(traced.order, traced.children, strict=True):
        if not is_users(node):
            continue
        for (child, number), position in zip(node.next_functions, children, strict=True):
            if position is not None:
                behind.append(traced.edge(position, number) if position >= 0 else GradientEdge(child, number))
    if behind:
        with traced.collecting(_Nobody()), _nothing_left_in_grad(traced):
            torch.autograd.grad(losses, behind, torch.full_like(losses, seed), retain_graph=True, allow_unused=True)


class _Nobody:
    """Takes no gradients, in a pass in which a function may not measure the graph that it is in."""

    def holds(self, call: Call) -> bool:
        return False

    def receive(self, call: Call, backprops: Any) -> None:
        pass


@contextmanager
def _nothing_left_in_grad(traced: Trace) -> Iterator[None]:
    """Refuse what leaves gradients in ``.grad`` of trained parameters, which is put aside while the context is open."""
    aside = [(name, tensor, tensor.grad) for name, tensor in traced.trained if tensor.is_leaf]
    for _, tensor, _ in aside:
        tensor.grad = None
    try:
        yield
        left = [name for name, tensor, _ in aside if tensor.grad is not None]
    finally:
        for _, tensor, gradient in aside:
            tensor.grad = gradient
    if left:
        functions = dict.fromkeys(node_name(node) for node in traced.order if is_users(node))
        raise RefusedError(
            f"engm: a backward pass inside of a torch.autograd.Function ({', '.join([*functions][:3])}) adds to .grad "
            f"of {', '.join(map(repr, left[:5]))}, which hides these gradients from the graph, so that norms would "
            "lack them. Hand the parameters to apply and return their gradients from backward (torch.autograd.grad in "
            "the place of torch.autograd.backward), or use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )


@contextmanager
def watched(
    functions: Sequence[OpaqueFunction], traced: Trace, n: int, seed: int, tell: Callable[[Tensor], None]
) -> Iterator[None]:
    """While the context is open, tell of every function that a backward pass runs whether it mixes the examples.

    What leaves gradients in ``.grad`` of trained parameters meanwhile is refused.

    Args:
        functions: of the graph's plan.
        traced: the graph.
        n: number of examples.
        seed: of the factors.
        tell: gets a truth value, 0-dimensional, for every input of a function.
    """
    factors, handles = _Factors(n, seed), []
    try:
        for function in functions:
            node, comparison = traced.order[function.position], _Comparison(function, factors, tell)
            if is_recomputed(node):  # what it saved may be asked for once, which is by the node itself
                tell(torch.ones((), dtype=torch.bool))
                continue
            handles.append(node.register_prehook(partial(comparison.before, node)))
            handles.append(node.register_hook(partial(comparison.after, node)))
        with _nothing_left_in_grad(traced):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Factors:
    """A factor for every example, between a half and one.

    Args:
        n: number of examples.
        seed: of the factors.
    """

    def __init__(self, n: int, seed: int) -> None:
        self._n = n
        with unrecorded():
            drawn = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
            of_each = torch.exp2(-drawn)
        self._of_each = constant(of_each)
        self._rows: dict[Hashable, Tensor] = {}

    def times(self, gradient: Tensor, where: Ownership) -> Tensor:
        """A gradient with every row multiplied by its owner's factor; rows of nobody stay as they are."""
        key = (where if isinstance(where, Layout) else id(where), gradient.shape[:2], gradient.dtype, gradient.device)
        if key not in self._rows:
            owners = owners_of(where, tuple(gradient.shape), self._n, gradient.device)
            self._rows[key] = owners.each(self._of_each.to(gradient.device), 1.0).to(gradient.real.dtype)
        rows = self._rows[key]
        return gradient * rows.view(*rows.shape, *[1] * (gradient.dim() - rows.dim()))


class _Comparison:
    """What one function hands on for gradients with factors, against what it does without."""

    def __init__(self, function: OpaqueFunction, factors: _Factors, tell: Callable[[Tensor], None]) -> None:
        self._function, self._factors, self._tell = function, factors, tell
        self._passed: list[Tensor | None] = []

    def before(self, node: Node, gradients: Sequence[Tensor | None]) -> None:
        """Node hook: run the function's backward on gradients with factors."""
        given: list[Tensor | None] = []
        for gradient, where in zip(gradients, self._function.outputs, strict=True):
            if gradient is not None:  # of where no gradient was when the plan was made nothing is known
                gradient = gradient.clone() if where is None else self._factors.times(gradient.detach(), where)
            given.append(gradient)
        self._passed = passed_to_inputs(node, given)

    def after(self, node: Node, given: Sequence[Tensor | None], _: Sequence[Tensor | None]) -> None:
        """Node hook: compare what the function handed on."""
        for slot, where in self._function.inputs.items():
            plain, scaled = given[slot], self._passed[slot]
            if plain is None or scaled is None:
                present = scaled if plain is None else plain
                if present is not None:
                    self._tell((dense(present) != 0).any())
                continue
            shape = entering_shape(*node.next_functions[slot])
            plain, scaled = (dense(passed).sum_to_size(shape) for passed in (plain, scaled))  # as autograd does
            if plain.numel():
                tolerance = TOLERANCE.get(plain.real.dtype, NARROW_TOLERANCE)
                differs, largest = (t.abs().amax() for t in (scaled - self._factors.times(plain, where), plain))
                self._tell(differs > tolerance * largest)
        self._passed = []
