"""In which rows of the network's inputs each example lies, for the norms of input gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..distributed import on_any
from ..terms.layout import Layout
from ..terms.owners import NOBODY, Owners, Ownership
from ..torch_internals import BATCH_NORMS, batch_norm_statistics, operator_name, recomputed_once
from .arrangement import arranged, culprit_of
from .owners import SEVERAL, Question
from .plan import Plan
from .planning import make_plan
from .structure import Structure
from .trace import Trace

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def plan_of_inputs(traced: Trace, losses: Tensor, tensors: Sequence[Tensor], seed: float = 1.0) -> Plan:
    """Where the examples lie in tensors that the losses depend on, as the ``layouts`` of a plan.

    Where several examples have a share in an element, as behind a batch norm in training mode, or where no gradient
    comes to, examples are taken to lie along the first dimension in order, several times if there are as many rows.

    Args:
        traced: the graph.
        losses: ``[n]``.
        tensors: the inputs, which require grad.
        seed: what losses are multiplied by in backward passes.

    Raises:
        ValueError: the examples do not lie along the first dimension of one of them.
    """
    n = losses.shape[0]
    usual = [_usual(tensor, n) for tensor in tensors]
    if n == 1 and traced.group is None:
        return Plan(tuple(_required(layout, tensor, n) for layout, tensor in zip(usual, tensors, strict=True)))
    structure = Structure(traced, ())
    with recomputed_once():
        couplings = [
            position
            for position, node in enumerate(traced.order)
            if operator_name(node) in BATCH_NORMS and not structure.called_batch_norm(position)
            if (statistics := batch_norm_statistics(node)) is not None and statistics[2]
        ]
    question = Question(traced, losses, seed, couplings, group=traced.group)
    question.ask(structure.looked_at, tensors=tensors)
    found: list[Ownership] = []
    keeps = not question.blind
    by_tensor = dict(question.tensors)
    mixed = [number for number, owners in by_tensor.items() if bool((owners == SEVERAL).any())]
    if on_any(traced.group, bool(mixed), losses.device):  # the examples may lie along the last dimension
        question.ask((), by_element=True, tensors=[tensors[number] for number in mixed])
        by_tensor |= {number: question.tensors[k] for k, number in enumerate(mixed) if k in question.tensors}
    for number, tensor in enumerate(tensors):
        owners = by_tensor.get(number)
        if owners is None or bool((owners == SEVERAL).any()) or not bool((owners != NOBODY).any()):
            found.append(_required(usual[number], tensor, n))
            continue
        blind = question.blind.get(("tensor", number))
        arrangement = arranged(owners, n, blind, None if blind is None else culprit_of(losses))
        if isinstance(arrangement.ownership, Layout):
            found.append(arrangement.ownership)
        else:
            found.append(Owners(arrangement.ownership.of.to(losses.device), n, arrangement.lost))
            keeps = keeps and arrangement.unknown is None
    holds = _plan_as_if_trained(traced, losses, seed)
    return Plan(tuple(found), routes=holds.routes, keeps=keeps and holds.keeps and not holds.doubtful)


@dataclass
class _Unwatched:
    """A wrapper of no network, by which nothing is refused."""

    strict: bool = False
    coupled: str = "exact"
    shard_group: ProcessGroup | None = None

    def buffers(self) -> Iterator[Tensor]:
        return iter(())


def _plan_as_if_trained(traced: Trace, losses: Tensor, seed: float) -> Plan:
    """The plan of the graph if its inputs were what is trained: it tells for how long the order of rows holds."""
    inputs = [(str(k), leaf) for k, leaf in enumerate(traced.leaves.values()) if not isinstance(leaf, nn.Parameter)]
    try:
        return make_plan(_Unwatched(), replace(traced, trained=inputs), losses, seed)  # type: ignore[arg-type]
    except RuntimeError:
        return Plan((), keeps=False)


def _usual(tensor: Tensor, n: int) -> Ownership | None:
    rows = tensor.shape[0] if tensor.dim() else 0
    if tensor.dim() and rows == 0:
        return Owners(torch.zeros(0, dtype=torch.long, device=tensor.device), n)
    if rows == 0 or rows % n:
        return None
    return Layout(0, 1, rows) if n == 1 else Layout(0, rows // n, 1)


def _required(layout: Ownership | None, tensor: Tensor, n: int) -> Ownership:
    if layout is None:
        raise ValueError(
            f"inputs must have the {n} examples along their first dimension, one of them has shape "
            f"{tuple(tensor.shape)}, so it has no gradient an example."
        )
    return layout
