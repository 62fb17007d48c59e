"""Whose each row of a tensor is, where the rows of the examples lie in no regular order.

Sequences sorted by length, graphs of many sizes in one batch, tokens routed to experts: there no shape tells which rows
are an example's, and a vector of owners does (:mod:`engm.graph.owners` measures it). What lies in a regular order has a
:class:`engm.terms.layout.Layout`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .layout import Layout

NOBODY = -1  # the owner of a row whose gradient is zero


@dataclass(frozen=True, eq=False)
class SortedRows:
    """Rows in the order of their owners: those of example ``i`` are ``order[starts[i] : starts[i] + counts[i]]``.

    Attributes:
        order: int64 ``[rows]``, the rows of nobody first; rows of one example keep their order.
        starts: int64 ``[n]``.
        counts: int64 ``[n]``, how many rows an example has.
        counts_on_host: the same in the memory of the host.
    """

    order: Tensor
    starts: Tensor
    counts: Tensor
    counts_on_host: Tensor


@dataclass(frozen=True, eq=False)
class Owners:
    """The owner of every row of a tensor ``[*leading, ...]``.

    Attributes:
        of: int64 ``[*leading]``, the number of the example that each row belongs to, or :data:`NOBODY`. Where
            ``leading`` are all dimensions of the tensor, every element has an owner of its own.
        n: number of examples.
    """

    of: Tensor
    n: int

    @property
    def dims(self) -> int:
        """How many leading dimensions of the tensor tell rows apart."""
        return self.of.dim()

    def elements(self, rank: int) -> Tensor:
        """The owners, with dimensions of length 1 behind up to ``rank``: they broadcast against the tensor."""
        return self.of.reshape(tuple(self.of.shape) + (1,) * (rank - self.dims))

    def flattened(self, shape: tuple[int, ...]) -> Owners:
        """The owners after the dimensions of a tensor of ``shape`` that tell rows apart were made one."""
        return self if self.dims == 1 else Owners(self.of.flatten(), self.n)

    @staticmethod
    def regular(layout: Layout, n: int, device: torch.device) -> Owners:
        """The owners of rows in the regular order of a ``layout`` along the first dimension."""
        return Owners(torch.arange(n, device=device).repeat_interleave(layout.inner).repeat(layout.outer), n)

    def then(self, further: Owners) -> Owners:
        """The owners of the same rows where example ``i`` of these belongs to example ``further.of.flatten()[i]``."""
        return Owners(self.each(further.of.flatten(), NOBODY), further.n)

    def each(self, values: Tensor, of_nobody: float) -> Tensor:
        """The value ``values[i]`` of every row's owner ``i``, in the shape of the owners.

        Args:
            values: ``[n]``.
            of_nobody: the value of rows that belong to nobody.
        """
        return torch.cat([values, values.new_full((1,), of_nobody)])[self.of]  # NOBODY stands for the last

    @cached_property
    def sorted_rows(self) -> SortedRows:
        """The rows, flattened, in the order of their owners; the host waits for their number once."""
        of = self.of.flatten()
        counts = of.new_zeros(self.n + 1).index_add_(0, of - NOBODY, torch.ones_like(of))
        starts = counts.cumsum(0)[:-1]
        return SortedRows(of.argsort(stable=True), starts, counts[1:], counts[1:].cpu())


Ownership = Layout | Owners
"""Where the examples of a batch lie in a tensor, in a regular order or in any."""
