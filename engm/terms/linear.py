"""The terms of linear and bilinear layers: sums of outer products over positions, from activations and backprops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .. import ops
from .._C import sums_of_outer_products
from ..ops import accumulation_dtype
from .base import CHUNK_BYTES, LocalCorrection, PerExampleGradient, Term
from .factors import PositionFactors, cheaper_to_keep, cheaper_to_scale, refuse_correction
from .owners import Owners


@dataclass
class LinearFactors(PositionFactors):
    """``g_i = B_i^T A_i``, the gradients of a weight ``[d, p]``.

    Attributes:
        activations: ``[n, T, p]``.
        backprops: ``[n, T, d]``.
        correction: what a batch norm behind the layer subtracts.
    """

    by_example: ClassVar[tuple[str, ...]] = ("activations", "backprops")

    activations: Tensor
    backprops: Tensor
    correction: LocalCorrection | None = None

    @property
    def gradient_shape(self) -> tuple[int, ...]:
        return self.backprops.shape[2], self.activations.shape[2]

    def squared_norm(self) -> Tensor:
        correction = self.correction.as_arguments() if self.correction else {}
        return ops.linear_norm_sq(self.activations, self.backprops, **correction)

    def compact(self) -> Term:
        (n, positions, p), d = self.activations.shape, self.backprops.shape[2]
        if p * d >= positions * (p + d) and not cheaper_to_keep(n * p * d, positions, self.backprops):
            return self
        norm_sq, gradients = ops.linear_grads(self.activations, self.backprops)
        return PerExampleGradient(gradients, norm_sq)

    def to_scale(self) -> Tensor:
        return cheaper_to_scale(self.backprops, self.activations)

    def sum_of_scaled(self, scaled: Tensor) -> Tensor:
        return self.sums_of_scaled([self], [self.to_scale()], [scaled])[0]

    @classmethod
    def sums_of_scaled(cls, terms: Sequence[Self], factors: Sequence[Tensor], scaled: Sequence[Tensor]) -> list[Tensor]:
        left, right = [], []
        for term, factor, weighted in zip(terms, factors, scaled, strict=True):
            of_backprops = factor is term.backprops
            left.append(weighted if of_backprops else term.backprops)
            right.append(term.activations if of_backprops else weighted)
        return sums_of_outer_products(left, right)

    def dense(self, rows: slice) -> Tensor:
        gradients = ops.linear_grads(self.activations[rows], self.backprops[rows])[1]
        return gradients if self.correction is None else self.correction.corrected(gradients, rows)

    def _folded(self, outer: int, n: int, inner: int) -> Self:
        refuse_correction(self.correction)
        return super()._folded(outer, n, inner)

    def _regrouped(self, owners: Owners) -> Term:
        refuse_correction(self.correction)
        return super()._regrouped(owners)


@dataclass
class BilinearFactors(PositionFactors):
    """``g_i[o] = sum_t b_to x_t y_t^T``, the gradients of a weight ``[d, p, q]``.

    Attributes:
        first: the ``x_t``, ``[n, T, p]``.
        second: the ``y_t``, ``[n, T, q]``.
        backprops: the ``b_t``, ``[n, T, d]``.
    """

    by_example: ClassVar[tuple[str, ...]] = ("first", "second", "backprops")

    first: Tensor
    second: Tensor
    backprops: Tensor

    @property
    def gradient_shape(self) -> tuple[int, ...]:
        return self.backprops.shape[2], self.first.shape[2], self.second.shape[2]

    def squared_norm(self) -> Tensor:
        if self.backprops.shape[1] == 1:
            # The product of two may be too large or too small for the type of that of all three.
            wide = [
                t.to(torch.promote_types(t.dtype, torch.float64)) for t in (self.first, self.second, self.backprops)
            ]
            first, second, backprops = (t.square().sum((1, 2)) for t in wide)
            return (first * second * backprops).to(accumulation_dtype(self.backprops))
        return torch.cat([ops.linear_norm_sq(self._pairs(rows), self.backprops[rows]) for rows in self._chunks()])

    def to_scale(self) -> Tensor:
        return self.backprops

    def sum_of_scaled(self, scaled: Tensor) -> Tensor:
        total = None
        for rows in self._chunks():
            part = scaled[rows].flatten(0, 1).t() @ self._pairs(rows).flatten(0, 1)
            total = part if total is None else total + part
        shape = self.gradient_shape
        return scaled.new_zeros(shape) if total is None else total.view(shape)

    def dense(self, rows: slice) -> Tensor:
        gradients = ops.linear_grads(self._pairs(rows), self.backprops[rows])[1]
        return gradients.unflatten(2, (self.first.shape[2], self.second.shape[2]))

    def _pairs(self, rows: slice) -> Tensor:
        """Products of the two inputs at every position, ``[rows, T, p q]``: the weight is linear in them."""
        return (self.first[rows].unsqueeze(3) * self.second[rows].unsqueeze(2)).flatten(2)

    def _chunks(self) -> Iterator[slice]:
        positions, p, q = *self.first.shape[1:], self.second.shape[2]
        chunk = max(1, CHUNK_BYTES // max(1, positions * p * q * self.first.element_size()))
        for start in range(0, self.examples, chunk):
            yield slice(start, start + chunk)
