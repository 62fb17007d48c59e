"""Whose each row of a tensor is, where the rows of the examples lie in no regular order.

Sequences sorted by length, graphs of many sizes in one batch, tokens routed to experts: there no shape tells which rows
are an example's, and a vector of owners does (:mod:`engm.graph.owners` measures it). What lies in a regular order has a
:class:`engm.terms.layout.Layout`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import PLAIN, Layout

Found = TypeVar("Found")

MOST_KEPT = 32  # of what was worked out of some owners
NOBODY = -1  # the owner of a row whose gradient is zero


@dataclass(frozen=True, eq=False)
class SortedRows:
    """Rows in the order of their owners: those of example ``i`` are ``order[starts[i] : starts[i] + counts[i]]``.

    Attributes:
        order: int64 ``[rows]``, the rows of nobody first; rows of one example keep their order.
        starts: int64 ``[n]``.
        counts: int64 ``[n]``, how many rows an example has.
    """

    order: Tensor
    starts: Tensor
    counts: Tensor

    @cached_property
    def counts_on_host(self) -> Tensor:
        """:attr:`counts` in the memory of the host, which waits for them once."""
        return self.counts.cpu()

    @cached_property
    def most(self) -> int:
        """Rows of the example with the most."""
        return int(self.counts_on_host.max())

    @cached_property
    def owned(self) -> int:
        """How many rows have an owner."""
        return int(self.counts_on_host.sum())


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples of similar numbers of rows.

    Attributes:
        numbers: of the examples, ``[k]``.
        length: rows of the example with the most.
        rows: the rows of each, those of a shorter example filled up with its last row, ``[k * length]``; None for a
            single example of more rows than may be copied at once.
        padding: which of ``rows`` are such a filling; None if none are.
    """

    numbers: Tensor
    length: int
    rows: Tensor | None
    padding: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Owners:
    """The owner of every row of a tensor ``[*leading, ...]``.

    What is worked out of them is kept: they are those of every step as long as a plan holds.

    Attributes:
        of: int64 ``[*leading]``, the number of the example that each row belongs to, or :data:`NOBODY`. Where
            ``leading`` are all dimensions of the tensor, every element has an owner of its own.
        n: number of examples.
        lost: whether rows that are not finite may be of other examples than those they are counted for.
    """

    of: Tensor
    n: int
    lost: bool = False
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    plain = False  # as of a layout: one row an example, in their order

    @property
    def dims(self) -> int:
        """How many leading dimensions of the tensor tell rows apart."""
        return self.of.dim()

    def elements(self, rank: int) -> Tensor:
        """The owners, with dimensions of length 1 behind up to ``rank``: they broadcast against the tensor."""
        return self.of.reshape(tuple(self.of.shape) + (1,) * (rank - self.dims))

    def flattened(self, shape: Sequence[int]) -> Owners:
        """The owners after the dimensions of a tensor of ``shape`` that tell rows apart were made one."""
        return self if self.dims == 1 else self.once("flattened", (), lambda: Owners(self.of.flatten(), self.n))

    @staticmethod
    def regular(layout: Layout, n: int, device: torch.device) -> Owners:
        """The owners of rows in the regular order of a ``layout`` along the first dimension."""
        return Owners(torch.arange(n, device=device).repeat_interleave(layout.inner).repeat(layout.outer), n)

    def of_examples(self) -> Owners:
        """The owners of a tensor that has one row for each of the examples, in their order."""
        return self.once("examples", (), lambda: Owners.regular(PLAIN, self.n, self.of.device))

    def then(self, further: Owners) -> Owners:
        """The owners of the same rows where example ``i`` of these belongs to example ``further.of.flatten()[i]``."""
        return self.once("then", (further,), lambda: Owners(self.each(further.of.flatten(), NOBODY), further.n))

    @staticmethod
    def behind_one_another(parts: Sequence[Owners], times: Sequence[int]) -> Owners:
        """The owners of the rows of several tensors, each row of a tensor as many times as is said of it."""
        first, *others = parts

        def found() -> Owners:
            rows = [part.of.flatten().repeat_interleave(each) for part, each in zip(parts, times, strict=True)]
            return Owners(torch.cat(rows), first.n)

        return first.once(("behind", *times), others, found)

    def once(self, what: Hashable, others: Sequence[Owners], found: Callable[[], Found]) -> Found:
        """What was found before, or is found now, of these owners and of others, which are the same objects then."""
        key = what, tuple(map(id, others))
        if key not in self._kept:
            if len(self._kept) >= MOST_KEPT:  # as where the others are new at every step
                del self._kept[next(iter(self._kept))]
            self._kept[key] = found(), others  # kept so that their ids stay theirs
        return self._kept[key][0]

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that there are of them so far."""
        yield self.of
        yield from _tensors_in(self.__dict__.get("sorted_rows"))
        for found, _ in self._kept.values():
            yield from _tensors_in(found)

    def each(self, values: Tensor, of_nobody: float) -> Tensor:
        """The value ``values[i]`` of every row's owner ``i``, in the shape of the owners.

        Args:
            values: ``[n]``.
            of_nobody: the value of rows that belong to nobody.
        """
        return torch.cat([values, values.new_full((1,), of_nobody)])[self.of]  # NOBODY stands for the last

    @cached_property
    def sorted_rows(self) -> SortedRows:
        """The rows, flattened, in the order of their owners."""
        of = self.of.flatten()
        counts = of.new_zeros(self.n + 1).index_add_(0, of - NOBODY, torch.ones_like(of))
        starts = counts.cumsum(0)[:-1]
        return SortedRows(of.argsort(stable=True), starts, counts[1:])

    def sums(self, rows: Tensor) -> Tensor:
        """The sum of every example's rows, ``[n, *]``.

        Args:
            rows: ``[rows, *]``, floating-point numbers; those of nobody must be finite.
        """
        if not rows.numel():
            return rows.new_zeros(self.n, *rows.shape[1:])
        owned = self.sorted_rows
        numbers = torch.view_as_real(rows.resolve_conj()) if rows.is_complex() else rows
        starts = torch.cat([owned.starts.new_zeros(1), owned.starts])  # the first rows are nobody's
        sums = F.embedding_bag(owned.order, numbers.reshape(len(rows), -1), starts, mode="sum")[1:]
        sums = sums.view(self.n, *numbers.shape[1:])
        return torch.view_as_complex(sums) if rows.is_complex() else sums

    def batches(self, first: int, end: int, most: int) -> list[Batch]:
        """The examples from ``first`` to ``end`` that own rows, in batches to be copied; worked out once.

        Of the examples of a batch none has more than half as many rows again as another: less than a third of what is
        copied is padding.

        Args:
            first: number of the first example.
            end: number behind the last.
            most: how many rows may be copied at once.
        """
        at_once = min(most, 2 * self.of.numel())  # no batch, with its padding, has as many
        return self.once((first, end, at_once), (), lambda: list(self._batched(first, end, at_once)))

    def _batched(self, first: int, end: int, most: int) -> Iterator[Batch]:
        by_owner = self.sorted_rows
        ascending, numbers = by_owner.counts_on_host[first:end].sort(stable=True)
        numbers = (numbers + first).to(by_owner.order.device)
        counts = ascending.tolist()
        start = bisect_right(counts, 0)
        while start < len(counts):
            end = bisect_right(counts, counts[start] + counts[start] // 2)
            end = min(end, start + max(1, most // counts[end - 1]))
            yield self.batch_of(numbers[start:end], ascending[start:end], most)
            start = end

    def batch_of(self, numbers: Tensor, counts: Tensor, most: int) -> Batch:
        """The batch of some examples.

        Args:
            numbers: of the examples; one of more than ``most`` rows comes alone.
            counts: how many rows each has, on the host.
            most: how many rows may be copied at once.
        """
        length = int(counts.max())
        missing = len(numbers) * length - int(counts.sum())
        return Batch(numbers, length, None) if length > most else self._padded(numbers, length, missing)

    def _padded(self, numbers: Tensor, length: int, missing: int) -> Batch:
        """Examples ``numbers`` of at most ``length`` rows, of which ``missing`` in all are filled up."""
        by_owner = self.sorted_rows
        place = torch.arange(length, device=numbers.device).expand(len(numbers), -1)
        counts = by_owner.counts[numbers].unsqueeze(1)
        of_rows = by_owner.starts[numbers].unsqueeze(1) + place.minimum(counts - 1)
        rows = by_owner.order[of_rows.clamp_(0, len(by_owner.order) - 1)]  # an example without rows has any filling
        padding = (place >= counts).flatten().nonzero_static(size=missing).flatten() if missing else None
        return Batch(numbers, length, rows.flatten(), padding)


def _tensors_in(found: Any) -> Iterator[Tensor]:
    """The tensors in what is kept of owners."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, Owners):
        yield from found.tensors()
    elif isinstance(found, SortedRows | Batch):
        yield from _tensors_in(tuple(vars(found).values()))
    elif isinstance(found, list | tuple):
        for part in found:
            yield from _tensors_in(part)


Ownership = Layout | Owners
"""Where the examples of a batch lie in a tensor, in a regular order or in any."""
