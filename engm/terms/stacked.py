"""The term of matrices that lie in one parameter, each of which has a term of its own: the weights of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Term
from .owners import Owners


@dataclass
class Stacked(Term):
    """The gradients of ``[k, *shape]``, from the terms of the ``k`` parts of ``[*shape]``, whose squared norms add up.

    Attributes:
        parts: the terms, of the same examples; at least one.
    """

    parts: Sequence[Term]

    @property
    def examples(self) -> int:
        return self.parts[0].examples

    def squared_norm(self) -> Tensor:
        return torch.stack([part.squared_norm() for part in self.parts]).sum(0)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return torch.stack([part.weighted_sum(weights) for part in self.parts])

    def dense(self, rows: slice) -> Tensor:
        return torch.stack([part.dense(rows) for part in self.parts], 1)

    def compact(self) -> Term:
        return Stacked([part.compact() for part in self.parts])

    def _folded(self, outer: int, n: int, inner: int) -> Term:
        return Stacked([part.fold(outer, n, inner) for part in self.parts])

    def _regrouped(self, owners: Owners) -> Term:
        return Stacked([part.regrouped(owners) for part in self.parts])
