"""Per-example gradients of a parameter that is not used as it is, but through tensors computed from it.

Such tensors are made by ``weight_norm``, ``spectral_norm`` and other parametrizations, by autocast, by cutting a weight
into pieces or interpolating a position table. For each of them there is a term, whose gradients autograd pulls back to
the parameter. A weighted sum is pulled back once. Norms need the gradient of every example pulled back, unless the
tensor only rearranges elements of the parameter, which leaves norms as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..terms import MixedTerm, Owners, Term, combine, squared_norm_of_dense
from ..torch_internals import leaf_of, node_outputs
from .any_operator import backward_of_each


@dataclass(frozen=True)
class Origin:
    """The tensor that entered the batch's computation, as an edge of the graph.

    Attributes:
        node: the node that made the tensor.
        number: which output of the node.
        rearranged: whether the tensor consists of elements of the parameter, each at most once.
    """

    node: Any
    number: int
    rearranged: bool

    @property
    def is_leaf(self) -> bool:
        """Whether the tensor is a parameter itself."""
        return leaf_of(self.node) is not None

    @property
    def edge(self) -> GradientEdge:
        """The tensor as autograd takes it for an output to differentiate."""
        return GradientEdge(self.node, self.number)


@dataclass
class Derived(Term):
    """The term of a parameter, from the term of a tensor that was computed from the parameter.

    Attributes:
        term: the term of the tensor.
        origin: the tensor.
        parameter: the parameter.
    """

    term: Term
    origin: Origin
    parameter: Tensor

    @property
    def examples(self) -> int:
        return self.term.examples

    def squared_norm(self) -> Tensor:
        if self.origin.rearranged:
            return self.term.squared_norm()
        return squared_norm_of_dense(self)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        total = self.term.weighted_sum(weights)
        return pull_back(self.origin.edge, self.parameter, total.unsqueeze(0))[0]

    def compact(self) -> Term:
        return Derived(self.term.compact(), self.origin, self.parameter)

    def dense(self, rows: slice) -> Tensor:
        return pull_back(self.origin.edge, self.parameter, self.term.dense(rows))

    def _regrouped(self, owners: Owners) -> Term:
        return Derived(self.term.regrouped(owners), self.origin, self.parameter)


@dataclass
class Pieces(MixedTerm):
    """The sum of the terms of disjoint pieces of a parameter, whose squared norms add up."""

    def squared_norm(self) -> Tensor:
        return torch.stack([part.squared_norm() for part in self.parts]).sum(0)

    def compact(self) -> Term:
        return Pieces([part.compact() for part in self.parts])


def derived_term(uses: Sequence[tuple[Origin | None, Term]], parameter: Tensor) -> Term:
    """One term for all uses of a parameter.

    Args:
        uses: for each use the tensor that was used (None: the parameter itself) and that tensor's term.
        parameter: the parameter.
    """
    by_origin: dict[Origin | None, list[Term]] = {}
    for origin, term in uses:
        by_origin.setdefault(origin, []).append(term)
    terms = [
        combine(found) if origin is None else Derived(combine(found), origin, parameter)
        for origin, found in by_origin.items()
    ]
    if len(terms) == 1:
        return terms[0]
    derived = [term for term in terms if isinstance(term, Derived) and term.origin.rearranged]
    if len(derived) == len(terms) and _disjoint(derived, parameter):
        return Pieces(terms)
    return MixedTerm(terms)


def _disjoint(terms: Sequence[Derived], parameter: Tensor) -> bool:
    """Whether rearranged tensors have no element of the parameter in common."""
    taken = torch.zeros_like(parameter)
    for term in terms:
        node, number = term.origin.node, term.origin.number
        meta = node_outputs(node)[number]
        ones = torch.ones(1, *meta.shape, dtype=meta.dtype, device=meta.device)
        taken += pull_back(term.origin.edge, parameter, ones)[0].to(taken.dtype)
    return bool((taken <= 1).all())


def pull_back(edge: GradientEdge, parameter: Tensor, gradients: Tensor) -> Tensor:
    """Gradients of a parameter, from gradients of a tensor that was computed from it.

    Args:
        edge: the tensor, of shape ``[*shape]``.
        parameter: the parameter.
        gradients: of the tensor, ``[k, *shape]``.

    Returns:
        ``[k, *parameter.shape]``.
    """

    def of(parts: Sequence[Tensor | None]) -> Tensor | None:
        (found,) = torch.autograd.grad([edge], [parameter], parts, retain_graph=True, allow_unused=True)
        return found

    return backward_of_each(of, [gradients], tuple(parameter.shape))
