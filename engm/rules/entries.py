"""What is known of a parameter that enters the batch's computation outside of layer calls, and how its rule is found.

Such a parameter, or a tensor computed from parameters, enters at one node of the autograd graph, which is described by
an :class:`Entry`. A rule for the node's operator turns the gradient of the node's output into the term of what entered.
Rules are registered here and written in :mod:`engm.rules.operators`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..terms import Term
from ..terms.layout import Layout
from ..terms.owners import Owners, Ownership
from ..torch_internals import (
    entering_dtype,
    node_outputs,
    operator_name,
    output_shape,
    saved_by,
)

SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


@dataclass(frozen=True)
class Entry:
    """One tensor without a batch that enters the batch's computation at one autograd node.

    Attributes:
        node: the node.
        slot: which of the node's inputs the tensor is.
        shape: of the tensor.
        layout: where the examples lie in the node's first output.
        n: number of examples.
        turns: how many nodes in a row, between the tensor and the node's input, transpose it (for matrix products).
        others: where the examples lie in the node's further outputs, None for one that no gradient arrives at; without
            any, the examples lie in all outputs as they do in the first.
    """

    node: Any
    slot: int
    shape: tuple[int, ...]
    layout: Ownership
    n: int
    turns: int = 0
    others: tuple[Ownership | None, ...] = ()

    @property
    def child(self) -> tuple[Any, int]:
        """The edge to the tensor that enters, behind the nodes that transpose it if there are any."""
        edge = self.node.next_functions[self.slot]
        for _ in range(self.turns):
            edge = edge[0].next_functions[0]
        return edge

    @property
    def transposed(self) -> bool:
        """Whether the node's input is the transpose of the tensor."""
        return self.turns % 2 == 1

    def saved(self, name: str) -> Any:
        """What the node saved under ``name`` (tensors detached, and none sparse), or None."""
        value = saved_by(self.node, name)
        return value.to_dense() if isinstance(value, Tensor) and value.layout in SPARSE else value

    @property
    def is_complex(self) -> bool:
        """Whether the tensor that enters has complex numbers."""
        return entering_dtype(*self.node.next_functions[self.slot]).is_complex

    def ownership(self, output: int) -> Ownership | None:
        """Where the examples lie in one of the node's outputs; None where no gradient arrives."""
        return self.others[output - 1] if output and self.others else self.layout

    def rows(self, most: int) -> Rows | None:
        """The leading dimensions of the node's first output in which the examples lie, as rows.

        Args:
            most: how many leading dimensions the operator treats alike. None is returned where the examples lie deeper.
        """
        shape = output_shape(self.node)
        where = self.layout
        if isinstance(where, Owners) and where.dims == 0:  # all is one example's
            where = Owners(where.of.expand(shape[:1]), where.n)
        dims = where.dims if isinstance(where, Owners) else where.dim + 1
        if dims > most:
            return None
        flat = where.flattened(shape)
        return Rows(dims, prod(shape[:dims]), flat)


@dataclass(frozen=True)
class Rows:
    """Leading dimensions of tensors, taken together as rows of which each belongs to one example or to nobody.

    Attributes:
        dims: how many dimensions there are.
        count: how many rows.
        ownership: of the rows, along one dimension.
    """

    dims: int
    count: int
    ownership: Ownership

    def of(self, tensor: Tensor) -> Tensor:
        """A tensor with these leading dimensions as ``[rows, *the other dimensions]``."""
        return tensor.reshape(self.count, *tensor.shape[self.dims :])

    def add_up(self, term: Term) -> Term:
        """The term of the examples, from a term that counts every row as an example."""
        return term.grouped(self.ownership)


def owners_of(where: Ownership, shape: tuple[int, ...], n: int, device: torch.device) -> Owners:
    """Owners that say the same as a layout of a tensor of ``shape`` does; owners are returned as they are."""
    if isinstance(where, Owners):
        return where
    along = Owners.regular(Layout(0, where.outer, where.inner), n, device)
    return along if where.dim == 0 else Owners(along.of.expand(shape[0], -1), n)


OperatorRule = Callable[[Entry, Tensor], Term | None]
"""``(entry, gradient of the node's first output) -> term of what enters``; None where the rule does not hold."""

_RULES: dict[str, OperatorRule] = {}
_COMPLEX: set[OperatorRule] = set()  # the rules that hold for complex numbers too


def names_of(text: str) -> frozenset[str]:
    """The names of operators, which white space parts."""
    return frozenset(text.split())


def add_operator(*names: str, of_complex: bool = False) -> Callable[[OperatorRule], OperatorRule]:
    """A decorator that registers a function as the rule of the operators with these names; for rules inside engm.

    Args:
        names: of the operators, without ``Backward0``.
        of_complex: whether the rule holds for complex numbers too.
    """

    def register(rule: OperatorRule) -> OperatorRule:
        for name in names:
            _RULES[name] = rule
        if of_complex:
            _COMPLEX.add(rule)
        return rule

    return register


def entry_term(entry: Entry, backprops: Sequence[Tensor | None]) -> Term | None:
    """The term of the tensor that enters by the rule of the node's operator; None if there is no rule that holds.

    Without a rule :func:`engm.rules.any_operator.term_of_any` has an answer.

    Args:
        entry: where the tensor enters.
        backprops: gradients of the summed losses with respect to the node's outputs.
    """
    first = backprops[0]
    rule = _rule_of(entry.node)
    if rule is None or first is None or first.is_nested or (first.is_complex() and rule not in _COMPLEX):
        return None
    return rule(entry, first.detach())


def _rule_of(node: Any) -> OperatorRule | None:
    """The rule of a node's operator."""
    return _RULES.get(operator_name(node))


def has_operator_rule(node: Any) -> bool:
    """Whether there is a rule for the node's operator, whether or not it holds for what enters."""
    return _rule_of(node) is not None


def has_rule(entry: Entry) -> bool:
    """Whether :func:`entry_term` has an answer, tried on a gradient of zeros."""
    output = node_outputs(entry.node)[0]
    if output.is_nested_tensor:
        return False
    zeros = torch.zeros((), dtype=output.dtype, device=output.device).expand(tuple(output.shape))
    return entry_term(entry, [zeros]) is not None
