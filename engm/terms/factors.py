"""What terms made of factors share: whatever is done to their examples is done to the factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from .. import ops
from .base import LocalCorrection
from .scattered import RowTerm

KEPT_ELEMENTS = 1 << 18  # of small gradients: a megabyte in float32


def cheaper_to_scale(backprops: Tensor, activations: Tensor) -> Tensor:
    """The smaller factor; in float16 always the backprops, which the loss scale keeps clear of underflow."""
    if backprops.dtype == torch.float16 or backprops.numel() <= activations.numel():
        return backprops
    return activations


def cheaper_to_keep(elements: int, positions: int, like: Tensor) -> bool:
    """Whether small gradients are better formed once and kept than formed for their norms and again for their sum.

    So it is on the CPU where an element is a sum of 16 products or more (5 to 25 % of both were measured).

    Args:
        elements: of the gradients of all examples.
        positions: how many products an element is the sum of.
        like: a factor.
    """
    return positions >= 16 and elements <= KEPT_ELEMENTS and like.is_cpu


class Factors(RowTerm):
    """A term of factors whose product is the gradient: weighting the examples of one factor weights the gradients.

    Attributes:
        by_example: names of the attributes that have examples, each a tensor ``[n, ...]``; ``backprops`` is one.
    """

    by_example: ClassVar[tuple[str, ...]]

    @property
    def examples(self) -> int:
        return getattr(self, self.by_example[0]).shape[0]

    def to_scale(self) -> Tensor:
        """The factor whose examples are weighted."""
        raise TypeError(f"{type(self).__name__} must define to_scale")

    def sum_of_scaled(self, scaled: Tensor) -> Tensor:
        """The sum over examples, given :meth:`to_scale` times the examples' weights."""
        raise TypeError(f"{type(self).__name__} must define sum_of_scaled")

    @classmethod
    def sums_of_scaled(cls, terms: Sequence[Self], factors: Sequence[Tensor], scaled: Sequence[Tensor]) -> list[Tensor]:
        """:meth:`sum_of_scaled` of several terms of this kind, given what their :meth:`to_scale` returned too."""
        return [term.sum_of_scaled(factor) for term, factor in zip(terms, scaled, strict=True)]

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.sum_of_scaled(ops.scale_examples([self.to_scale()], weights)[0])

    def held(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.by_example]

    def of(self, tensors: Mapping[str, Tensor]) -> Self:
        """This term with other factors; ``dataclasses.replace`` takes as long as a small product.

        Args:
            tensors: by name of the attribute.
        """
        return type(self)(**{**vars(self), **tensors})

    def selected(self, rows: Tensor, padding: Tensor | None) -> Self:
        tensors = {name: getattr(self, name).index_select(0, rows) for name in self.by_example}
        if padding is not None:
            tensors["backprops"].index_fill_(0, padding, 0)
        return self.of(tensors)


class PositionFactors(Factors):
    """A term of factors whose gradient is a sum over positions: every tensor of ``by_example`` is ``[n, T, ...]``.

    Uses of one parameter are joined, and rows of one example folded, by laying their positions side by side.
    """

    def joined(self, others: Sequence[Self], dim: int = 1) -> Self:
        """The term of this term and of ``others``, which are of the same kind.

        Args:
            others: the terms.
            dim: 1 lays the positions of the same examples side by side, 0 puts examples after one another.
        """
        tensors = {name: torch.cat([getattr(t, name) for t in (self, *others)], dim) for name in self.by_example}
        return self.of(tensors)

    def concatenated(self, others: Sequence[Self]) -> Self:
        return self.joined(others, 0)

    @property
    def row_length(self) -> int:
        return getattr(self, self.by_example[0]).shape[1]

    def cut(self, length: int) -> Self:
        split = {name: getattr(self, name).flatten(0, 1) for name in self.by_example}
        pieces = {name: t.unflatten(0, (len(t) // length, length)) for name, t in split.items()}
        return self.of(pieces)

    def _folded(self, outer: int, n: int, inner: int) -> Self:
        tensors = {}
        for name in self.by_example:
            tensor = getattr(self, name)
            if outer == 1:  # an example's rows lie side by side, and so do their positions
                tensors[name] = tensor.reshape(n, inner * tensor.shape[1], *tensor.shape[2:])
                continue
            split = tensor.reshape(outer, n, inner * tensor.shape[1], *tensor.shape[2:])
            tensors[name] = split.transpose(0, 1).flatten(1, 2)
        return self.of(tensors)


def refuse_correction(correction: LocalCorrection | None) -> None:
    """Refuses to fold or to regroup a term with a local correction.

    Raises:
        ValueError: there is a correction.
    """
    if correction is not None:
        raise ValueError(
            "a term with a local batch-norm correction cannot be folded or regrouped: correct the resulting term "
            "instead."
        )
