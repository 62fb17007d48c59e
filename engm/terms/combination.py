"""How the terms of several uses of one parameter become one term, whose gradients are the sums over the uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .base import PerExampleGradient, Term, squared_norm_of_dense
from .convolution import ConvFactors, joined_convolutions
from .embedding import EmbeddingFactors, TiedTable
from .factors import PositionFactors
from .linear import LinearFactors
from .owners import Owners
from .scattered import Scattered, batched_together, by_rows, joined_rows
from .stacked import Stacked


@dataclass
class MixedTerm(Term):
    """The sum of terms of different kinds.

    For the norm per-example gradients are formed, a chunk at a time. Where rows lie in no regular order, examples of
    similar numbers of rows are a regular batch, whose terms may have a kind in common; where no example has rows in two
    of the terms (a layer called once an example, on images of many sizes) that is one term. The weighted sum needs
    nothing of this.

    Attributes:
        parts: the terms, of the same parameter and the same examples.
    """

    parts: Sequence[Term]

    @property
    def examples(self) -> int:
        return self.parts[0].examples

    def squared_norm(self) -> Tensor:
        parts = by_rows(self.parts)
        if len(parts) < len(self.parts):
            return squared_norm_of_dense(self)
        found = parts[0].zeros(self.examples)
        for numbers, terms in batched_together(parts):
            found.index_copy_(0, numbers, combine(terms).squared_norm().to(found.dtype))
        return found

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return sum_of([part.weighted_sum(weights) for part in self.parts])

    def dense(self, rows: slice) -> Tensor:
        return sum_of([part.dense(rows) for part in self.parts])

    def compact(self) -> Term:
        return combine([part.compact() for part in self.parts])

    def _folded(self, outer: int, n: int, inner: int) -> Term:
        return MixedTerm([part.fold(outer, n, inner) for part in self.parts])

    def _regrouped(self, owners: Owners) -> Term:
        return replace(self, parts=[part.regrouped(owners) for part in self.parts])


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape; sparse ones come last, so that the sum is dense if any of them is."""
    first, *others = sorted(tensors, key=lambda tensor: tensor.is_sparse)
    for other in others:
        first = first + other
    return first


def combine(terms: Sequence[Term]) -> Term:
    """One term whose per-example gradient is the sum of the given ones (several uses of one parameter).

    Uses of one kind are joined in factored form: scattered ones row after row, others with their positions side by
    side. An embedding tied to a projection becomes a :class:`TiedTable`, any other mixture (two convolutions of
    different stride, a user's rule and a linear layer) a :class:`MixedTerm`.

    Args:
        terms: one term a use, of the same parameter and the same examples.
    """
    if len(terms) == 1:
        return terms[0]
    if any(isinstance(term, Scattered) for term in terms):
        terms = joined_rows(terms)
    whole = [term for term in terms if isinstance(term, PerExampleGradient)]
    joined: list[Term] = []
    if whole:
        joined.append(PerExampleGradient(sum_of([term.gradient for term in whole])) if len(whole) > 1 else whole[0])
    by_kind: dict[type[PositionFactors], list[PositionFactors]] = {}
    for term in terms:
        if isinstance(term, PositionFactors):
            by_kind.setdefault(type(term), []).append(term)
    joined += [first.joined(others) if others else first for first, *others in by_kind.values()]
    joined += joined_convolutions([term for term in terms if isinstance(term, ConvFactors)])
    stacks = [term.parts for term in terms if isinstance(term, Stacked)]
    if stacks:
        joined.append(Stacked([combine(parts) for parts in zip(*stacks, strict=True)]))
    kinds = PerExampleGradient | PositionFactors | ConvFactors | Stacked
    joined += [term for term in terms if not isinstance(term, kinds)]
    match joined:
        case [term]:
            return term
        case [EmbeddingFactors() as table, LinearFactors() as projection]:
            return TiedTable(table, projection)
        case [LinearFactors() as projection, EmbeddingFactors() as table]:
            return TiedTable(table, projection)
    return MixedTerm(joined)
