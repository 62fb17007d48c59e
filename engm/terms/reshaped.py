"""The term of a parameter whose gradients another term has in another shape: a stack of matrices as rows of a table."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from .base import Term
from .owners import Owners


@dataclass
class Reshaped(Term):
    """The gradients of another term, reshaped, which leaves their norms as they are.

    Attributes:
        term: the other term.
        shape: of a gradient.
    """

    term: Term
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.term, Reshaped):
            self.term = self.term.term

    @property
    def examples(self) -> int:
        return self.term.examples

    def squared_norm(self) -> Tensor:
        return self.term.squared_norm()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.term.weighted_sum(weights).view(self.shape)

    def dense(self, rows: slice) -> Tensor:
        found = self.term.dense(rows)
        return found.reshape(len(found), *self.shape)

    def compact(self) -> Term:
        return replace(self, term=self.term.compact())

    def _folded(self, outer: int, n: int, inner: int) -> Term:
        return replace(self, term=self.term.fold(outer, n, inner))

    def _regrouped(self, owners: Owners) -> Term:
        return replace(self, term=self.term.regrouped(owners))
