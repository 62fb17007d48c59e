"""What is known of a parameter that enters the batch's computation outside of layer calls, and how its rule is found.

Such a parameter, or a tensor computed from parameters, enters at one node of the autograd graph, which is described by
an :class:`Entry`. A rule for the node's operator turns the gradient of the node's output into the term of what entered.
Rules are registered here and written in :mod:`engm.rules.operators`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..terms import Term
from ..terms.owners import Owners, Ownership
from ..torch_internals import (
    BATCH_NORM_NODES,
    SYNC_BATCH_NORM_NODE,
    node_outputs,
    operator_name,
    output_shape,
    saved_by,
)

BATCH_NORMS = tuple(name.removesuffix("Backward") for name in (*BATCH_NORM_NODES, SYNC_BATCH_NORM_NODE))


@dataclass(frozen=True)
class Entry:
    """One tensor without a batch that enters the batch's computation at one autograd node.

    Attributes:
        node: the node.
        slot: which of the node's inputs the tensor is.
        shape: of the tensor.
        layout: where the examples lie in the node's (first) output.
        n: number of examples.
        transposed: whether the node's input is the transpose of the tensor (for matrix products).
    """

    node: Any
    slot: int
    shape: tuple[int, ...]
    layout: Ownership
    n: int
    transposed: bool = False
    others: tuple[Ownership | None, ...] = ()

    @property
    def child(self) -> tuple[Any, int]:
        """The edge to the tensor that enters, behind the node that transposes it if there is one."""
        edge = self.node.next_functions[self.slot]
        return edge[0].next_functions[0] if self.transposed else edge

    def saved(self, name: str) -> Any:
        """What the node saved under ``name`` (tensors detached), or None."""
        return saved_by(self.node, name)


OperatorRule = Callable[[Entry, Tensor], Term | None]
"""``(entry, gradient of the node's first output) -> term of what enters``; None where the rule does not hold."""

_RULES: dict[str, OperatorRule] = {}


def add_operator(*names: str) -> Callable[[OperatorRule], OperatorRule]:
    """A decorator that registers a function as the rule of the operators with these names; for rules inside engm."""

    def register(rule: OperatorRule) -> OperatorRule:
        for name in names:
            _RULES[name] = rule
        return rule

    return register


def entry_term(entry: Entry, backprops: Sequence[Tensor | None]) -> Term | None:
    """The term of the tensor that enters by the rule of the node's operator; None if there is no rule that holds.

    Without a rule :func:`engm.rules.any_operator.masked_gradients` has an answer.

    Args:
        entry: where the tensor enters.
        backprops: gradients of the summed losses with respect to the node's outputs.
    """
    rule = _RULES.get(operator_name(entry.node))
    first = backprops[0]
    if rule is None or first is None or first.is_complex() or isinstance(entry.layout, Owners):
        return None
    return rule(entry, first.detach())


def has_rule(entry: Entry) -> bool:
    """Whether :func:`entry_term` has an answer, tried on a gradient of zeros."""
    output = node_outputs(entry.node)[0]
    zeros = torch.zeros((), dtype=output.dtype, device=output.device).expand(tuple(output.shape))
    return entry_term(entry, [zeros]) is not None


def enters_by_broadcast(entry: Entry) -> bool:
    """Whether every example sees the same values of the tensor: it is a weight, or is repeated over the batch."""
    by_position = {"Bmm": (1,), "Embedding": (0,), "NativeLayerNorm": (1, 2), "FusedRmsNorm": (1, 2)}
    by_row = {"Mm": (1,), "Addmm": (0, 2), "Convolution": (1, 2)}
    by_row |= dict.fromkeys(("NativeGroupNorm", *BATCH_NORMS), (1, 2))
    name = operator_name(entry.node)
    if name in by_position:
        return entry.slot in by_position[name]
    if name in by_row:
        return entry.slot in by_row[name] and entry.layout.dim == 0  # dimension 1 is the weight's own
    rank = len(output_shape(entry.node))
    if len(entry.shape) > rank:
        return False
    rows = aligned_shape(entry)[entry.layout.dim]
    return rows == 1 or (name == "Repeat" and entry.layout.inner % rows == 0)  # each example gets whole copies


def aligned_shape(entry: Entry) -> tuple[int, ...]:
    """The entering tensor's shape as broadcasting sees it: with leading ones to the rank of the node's output."""
    rank = len(output_shape(entry.node))
    return (1,) * (rank - len(entry.shape)) + entry.shape
