"""Plans for networks whose rows are moved otherwise at every step, made with one backward pass less.

Once it is known where rows and parameters are in graphs of one skeleton, it remains to be told whose the rows are in
those calls and entries alone. So the losses are backpropagated once, scaled by powers of two, and the pass that norms
are taken from does for the plain one: each call's owners are told when its gradient arrives. Where a row turns out to
be of several examples, or a call's rule cannot be told of the order, the graph is measured from the beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..capture.calls import Call
from ..terms.layout import PLAIN
from ..terms.owners import Owners, Ownership
from ..torch_internals import entering_shape, node_outputs, output_shape
from .arrangement import Arrangements
from .fitting import OwnersOnDevice, agreed, fits
from .owners import SEVERAL, Answers, Question, rows_of_call
from .plan import Plan, PlannedEntry, Told, UntoldError
from .trace import Trace


def may_be_told(plan: Plan, traced: Trace, n: int) -> bool:
    """Whether a plan of one graph says where to look in another of the same skeleton."""
    if n == 1 or traced.group is not None or torch.float16 in traced.dtypes:
        return False
    if traced.hooked and traced.owner is not None and traced.owner.coupled == "exact":
        return False  # what hooks couple has to be known before the gradients are compared with autograd's
    unusual = any(isinstance(layout, Owners) and layout.dims == 0 for layout in plan.layouts)
    # Rows are told here. Where their elements are of several examples, the largest may hide all others.
    unusual = unusual or any(
        isinstance(entry.layout, Owners) and entry.layout.dims == len(output_shape(traced.order[entry.position]))
        for entry in plan.entries
    )
    # What rounding leaves where shares cancel would be multiplied by the powers of other examples.
    return not (plan.couples or plan.through or plan.coupled or plan.cancels or plan.blind or unusual)


def plan_to_be_told(traced: Trace, losses: Tensor, known: Plan, seed: float) -> Plan | None:
    """A plan whose layouts are told when the gradients arrive; None where a gradient comes to what had none.

    Args:
        traced: the graph.
        losses: ``[n]``.
        known: the plan of another graph of the same skeleton, which :func:`may_be_told`.
        seed: what losses are multiplied by in backward passes.
    """
    question = Question(traced, losses, seed)
    positions = {entry.position for entry in known.entries} | set(known.silent)
    positions |= {
        traced.positions[traced.nodes[number]] for number, layout in enumerate(known.layouts) if layout is not None
    }
    answers = Answers(question, positions)
    if answers.any_gradient(known.silent):
        return None
    told = _Told(traced, losses, answers)
    entries = tuple(replace(entry, shape=_shape_now(traced, entry)) for entry in known.entries)
    nothing: dict[Any, Any] = {}
    return replace(
        known,
        entries=entries,
        routes=(),
        keeps=False,
        unknown_of_calls=nothing,
        unknown_of_nodes=nothing,
        junctions=nothing,
        opaque=(),
        told=told,
    )


def _shape_now(traced: Trace, entry: PlannedEntry) -> tuple[int, ...]:
    """The shape of what enters, which may hang on the data."""
    child, number = traced.order[entry.position].next_functions[entry.slot]
    for _ in range(entry.turns):
        child, number = child.next_functions[0]
    return entering_shape(child, number)


class _Told(Told):
    """Tells whose the rows are as soon as their gradient is there, and remembers it."""

    def __init__(self, traced: Trace, losses: Tensor, answers: Answers) -> None:
        self._traced, self._answers = traced, answers
        self._numbers = {id(call): number for number, call in enumerate(traced.calls)}
        self._found: dict[Any, Ownership] = {}
        self._about = Arrangements(losses)
        self._on_device = OwnersOnDevice(losses.device)

    def of_call(self, call: Call, backprops: Any) -> Ownership:
        number = self._numbers[id(call)]
        key = ("call", number)
        if key not in self._found:
            if self._traced.seen_by_collector(number):
                parts = enumerate(rows_of_call(call, backprops))
                owners = agreed([self._answers.owners(("call", number, part), rows) for part, rows in parts])
            else:
                position = self._traced.positions[self._traced.nodes[number]]
                owners = self._answers.owners((position, call.output_nr), backprops)
            found = self._ownership(owners)
            if not fits(call, found):
                raise UntoldError
            self._found[key] = found
        return self._found[key]

    def at(self, entry: PlannedEntry, gradients: Sequence[Tensor | None]) -> PlannedEntry:
        position = entry.position
        if position == len(self._traced.order) - 1:
            return replace(entry, layout=PLAIN)
        outputs = range(len(node_outputs(self._traced.order[position])))
        found = [self._of_output(position, k, gradients[k] if k < len(gradients) else None) for k in outputs]
        return replace(entry, layout=found[0] or PLAIN, others=tuple(found[1:]))

    def _of_output(self, position: int, number: int, gradient: Tensor | None) -> Ownership | None:
        if gradient is None:
            return None
        key = (position, number)
        if key not in self._found:
            self._found[key] = self._ownership(self._answers.owners(key, gradient))
        return self._found[key]

    def _ownership(self, owners: Tensor) -> Ownership:
        if bool((owners <= SEVERAL).any()):
            raise UntoldError
        return self._on_device(self._about.arranged(owners).ownership)
