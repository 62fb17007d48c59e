"""Whose each row of a tensor is, where the rows of the examples lie in no regular order.

Sequences sorted by length, graphs of many sizes in one batch, tokens routed to experts: there no shape tells which rows
are an example's, and a vector of owners does (:mod:`engm.graph.owners` measures it). What lies in a regular order has a
:class:`engm.terms.layout.Layout`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .layout import Layout

NOBODY = -1  # the owner of a row whose gradient is zero


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
        return Owners(self.of.flatten(), self.n)


Ownership = Layout | Owners
"""Where the examples of a batch lie in a tensor, in a regular order or in any."""
