"""Where the examples of a batch lie in a tensor: along the first dimension, in blocks of it, or along the second.

A layer inside a network often sees more rows than there are examples: attention windows ``[n * windows, ...]``,
patches, time-major sequences ``[T, n, ...]``, or such a thing flattened for a matrix product, ``[T * n, ...]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Dimension ``dim`` of a tensor has length ``outer * n * inner``; the middle factor counts the examples.

    Attributes:
        dim: the dimension along which the examples lie, 0 or 1.
        outer: how often the whole batch is repeated (views, time steps).
        inner: how many rows of one example lie side by side (windows, patches, tokens).
        plain: whether the tensor is ``[n, ...]``.
    """

    dim: int = 0
    outer: int = 1
    inner: int = 1
    plain: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plain", self.dim == 0 and self.outer == 1 and self.inner == 1)

    @property
    def rows(self) -> int:
        """Rows of one example."""
        return self.outer * self.inner

    def examples_first(self, tensor: Tensor, n: int) -> Tensor:
        """A tensor of this layout as ``[n, rows, *the other dimensions]``."""
        moved = tensor if self.dim == 0 else tensor.movedim(self.dim, 0)
        if self.outer == 1:
            return moved.reshape(n, self.inner, *moved.shape[1:])
        return moved.reshape(self.outer, n, self.inner, *moved.shape[1:]).transpose(0, 1).flatten(1, 2)

    def from_examples(self, tensor: Tensor) -> Tensor:
        """A tensor of this layout from ``[n, rows, *the other dimensions]``: the inverse of :meth:`examples_first`."""
        n, rest = tensor.shape[0], tensor.shape[2:]
        split = tensor.reshape(n, self.outer, self.inner, *rest).transpose(0, 1)
        return split.reshape(self.outer * n * self.inner, *rest).movedim(0, self.dim)

    def flattened(self, shape: Sequence[int]) -> Layout:
        """The layout after a tensor of ``shape`` had its first two dimensions flattened."""
        return self if self.dim == 0 else Layout(0, shape[0] * self.outer, self.inner)


PLAIN = Layout()
