"""The term of examples whose rows lie in no regular order, from a term of the rows and the owners of these.

An example's gradient is the sum over its rows. The weighted sum needs no more than a weight for every row. For norms,
examples of similar numbers of rows are put together as a regular batch, which is padded with rows whose gradient is
zero and folded: then the kernels of the row term answer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any, Self

import torch
from torch import Tensor

from ..ops import accumulation_dtype
from .base import PerExampleGradient, Term
from .layout import Layout
from .owners import Batch, Owners

SIMILAR = 0.585  # the binary logarithm of how many times as many rows an example of a batch may have as another

GATHERED_BYTES = 8 << 20  # of rows that are copied at once, or the size of one example's gradient where that is larger


class RowTerm(Term):
    """A term whose examples can be copied in any order and number, so that they can be the rows of other examples."""

    @property
    def gradient_shape(self) -> tuple[int, ...]:
        """Shape of one example's gradient."""
        raise TypeError(f"{type(self).__name__} must define gradient_shape")

    def held(self) -> list[Tensor]:
        """The tensors that the term is made of, each with examples first; backprops come last."""
        raise TypeError(f"{type(self).__name__} must define held")

    def selected(self, rows: Tensor, padding: Tensor | None) -> Self:
        """The term of some examples, copied in the order that is asked for.

        Args:
            rows: int64 ``[m]``, the numbers of the examples; a number may come more than once.
            padding: int64, the places among the ``m`` whose gradient is zero instead of the example's.
        """
        raise TypeError(f"{type(self).__name__} must define selected")

    @property
    def alike(self) -> Hashable:
        """Terms of one parameter that agree in this can be :meth:`concatenated`."""
        return (type(self),)

    @property
    def row_length(self) -> int:
        """Into how many rows, all alike, an example can be :meth:`cut`."""
        return 1

    def cut(self, length: int) -> Self:
        """The term whose examples are parts of this term's examples, in order.

        Args:
            length: of a part; it divides :attr:`row_length`.
        """
        return self

    def concatenated(self, others: Sequence[Self]) -> Self:
        """The term of the examples of this one and then of ``others``, which are alike and of one row length."""
        raise TypeError(f"{type(self).__name__} must define concatenated")

    @property
    def may_be_formed(self) -> bool:
        """Whether the gradients themselves may stand for this term, in the weighted sum too."""
        return True

    def _regrouped(self, owners: Owners) -> Term:
        return Scattered(self, owners)


@dataclass
class Scattered(Term):
    """The term of the examples that own the rows of another term.

    Attributes:
        rows: the term that counts every row as an example.
        owners: of the rows.
    """

    rows: RowTerm
    owners: Owners

    @property
    def examples(self) -> int:
        return self.owners.n

    def squared_norm(self) -> Tensor:
        found = self.zeros(self.examples)
        owned = self.owners.sorted_rows
        if owned.most == 1:  # the rows' own norms, in another order
            norms = self.rows.squared_norm().to(found.dtype)
            present = owned.counts.nonzero_static(size=owned.owned).flatten()
            return found.index_copy_(0, present, norms[owned.order[owned.starts[present]]])
        for numbers, term in self._regular(slice(0, self.examples)):
            found.index_copy_(0, numbers, term.squared_norm().to(found.dtype))
        return found

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.rows.weighted_sum(self.owners.each(weights, 0).flatten())

    def dense(self, rows: slice) -> Tensor:
        first, end, _ = rows.indices(self.examples)
        found = self.zeros(end - first, *self.rows.gradient_shape)
        for numbers, term in self._regular(slice(first, end)):
            found.index_copy_(0, numbers - first, term.dense(slice(0, term.examples)).to(found.dtype))
        return found

    def compact(self) -> Term:
        """The gradients themselves where they take less memory than the factors of all rows, else this term."""
        kept = sum(tensor.nbytes for tensor in self.rows.held())
        if not self.rows.may_be_formed or self.examples * self._gradient_bytes() >= kept:
            return self
        return PerExampleGradient(self.dense(slice(0, self.examples)))

    def _folded(self, outer: int, n: int, inner: int) -> Term:
        return self._regrouped(Owners.regular(Layout(0, outer, inner), n, self.owners.of.device))

    def _regrouped(self, owners: Owners) -> Term:
        return Scattered(self.rows, self.owners.then(owners))

    def zeros(self, *shape: int) -> Tensor:
        """Zeros in the type that norms and gradients are added up in."""
        backprops = self.rows.held()[-1]
        return backprops.new_zeros(shape, dtype=accumulation_dtype(backprops))

    def _gradient_bytes(self) -> int:
        return prod(self.rows.gradient_shape) * accumulation_dtype(self.rows.held()[-1]).itemsize

    def at_once(self) -> int:
        """How many rows may be copied at once."""
        row = sum(tensor.nbytes for tensor in self.rows.held()) // max(1, self.rows.examples)
        return max(1, max(GATHERED_BYTES, self._gradient_bytes()) // max(1, row))

    def _regular(self, examples: slice) -> Iterator[tuple[Tensor, Term]]:
        """The numbers of some of the ``examples`` and their regular term, until all that have rows had their turn.

        An example of more rows than may be copied at once comes alone and with its gradient formed, which is then
        smaller than its rows.
        """
        most = self.at_once()
        for batch in self.owners.batches(examples.start, examples.stop, most):
            yield batch.numbers, self.regular(batch, most)

    def regular(self, batch: Batch, most: int) -> Term:
        """The term of the examples of a batch, of which at most so many rows are copied at once."""
        if batch.rows is None:
            return self._formed(batch.numbers, batch.length, most)
        return self.rows.selected(batch.rows, batch.padding).fold(1, len(batch.numbers), batch.length)

    def _formed(self, number: Tensor, length: int, most: int) -> Term:
        """The gradient of one example, from at most ``most`` of its ``length`` rows at once."""
        by_owner = self.owners.sorted_rows
        total = self.zeros(1, *self.rows.gradient_shape)
        for first in range(0, length, most):
            some = torch.arange(first, min(first + most, length), device=number.device)
            rows = self.rows.selected(by_owner.order[by_owner.starts[number] + some], None)
            total += rows.fold(1, 1, len(some)).dense(slice(0, 1))
        return PerExampleGradient(total)


def batched_together(parts: Sequence[Scattered]) -> Iterator[tuple[Tensor, list[Term]]]:
    """The numbers of examples that have similar numbers of rows in each of several terms, and their regular terms.

    Examples without rows come in no batch. Of a term in which none of a batch has rows there is none.

    Args:
        parts: of the same examples.
    """
    owners, most = [part.owners for part in parts], tuple(part.at_once() for part in parts)
    batches = owners[0].once(("together", most), owners[1:], lambda: list(_batches_of_all(owners, most)))
    for numbers, found in batches:
        yield (
            numbers,
            [
                part.regular(batch, at_once)
                for part, batch, at_once in zip(parts, found, most, strict=True)
                if batch is not None
            ],
        )


def _batches_of_all(owners: Sequence[Owners], most: Sequence[int]) -> Iterator[tuple[Tensor, list[Batch | None]]]:
    """The numbers of examples of similar numbers of rows, and their batches; None where none of them has rows.

    Args:
        owners: of the rows of several terms.
        most: how many rows of each may be copied at once.
    """
    counts = torch.stack([each.sorted_rows.counts_on_host for each in owners], 1)
    sizes = (counts.double().log2() / SIMILAR).ceil().tolist()  # minus infinity where there are no rows
    alike: dict[tuple[float, ...], list[int]] = {}
    for number, size in enumerate(map(tuple, sizes)):
        alike.setdefault(size, []).append(number)
    for numbers in alike.values():
        longest = counts[numbers].amax(0).tolist()
        at_once = max(1, min((each // length for each, length in zip(most, longest, strict=True) if length), default=0))
        for some in torch.tensor(numbers).split(at_once) if any(longest) else ():
            own = some.to(owners[0].of.device)
            rows = zip(owners, counts[some].unbind(1), most, strict=True)
            yield (
                own,
                [each.batch_of(own, count, at_once) if int(count.max()) else None for each, count, at_once in rows],
            )


def by_rows(terms: Sequence[Term]) -> list[Scattered]:
    """The terms that have owners of rows, and if there are any, regular terms as such; others are left out."""
    scattered = [term for term in terms if isinstance(term, Scattered)]
    if not scattered:
        return []
    return [found for term in terms if (found := _with_owners(term, scattered[0])) is not None]


def _with_owners(term: Term, other: Scattered) -> Scattered | None:
    """A term as one that has owners of rows, if it has rows; its examples are those of another."""
    if isinstance(term, RowTerm):
        term = term.regrouped(other.owners.of_examples())
    return term if isinstance(term, Scattered) else None


def joined_rows(terms: Sequence[Term]) -> list[Term]:
    """The terms of the uses of one parameter, some of them scattered, in which those of like rows have become one.

    A regular term joins scattered ones of its kind: its examples are rows that own themselves. Terms that are like no
    scattered one stay as they are.
    """
    scattered = [term for term in terms if isinstance(term, Scattered)]
    groups: dict[Hashable, list[Scattered]] = {term.rows.alike: [] for term in scattered}
    others = []
    for term in terms:
        owned = _with_owners(term, scattered[0])
        if owned is not None and owned.rows.alike in groups:
            groups[owned.rows.alike].append(owned)
        else:
            others.append(term)
    return [*map(_concatenated, groups.values()), *others]


def _concatenated(uses: list[Scattered]) -> Scattered:
    """One term for several whose rows are alike; rows of different lengths are cut to a length that divides all."""
    if len(uses) == 1:
        return uses[0]
    length = max(1, gcd(*(use.rows.row_length for use in uses)))
    rows: list[Any] = [use.rows.cut(length) for use in uses]
    owners = Owners.behind_one_another([use.owners for use in uses], [use.rows.row_length // length for use in uses])
    first, *others = rows
    return Scattered(first.concatenated(others), owners)
