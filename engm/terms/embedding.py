"""The terms of a table that rows are looked up in, alone and tied to a projection: from indices and backprops."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .. import ops
from ..ops import accumulation_dtype
from .base import CHUNK_BYTES, Term, squared_norm_of_dense
from .factors import PositionFactors
from .linear import LinearFactors
from .scattered import RowTerm


@dataclass
class EmbeddingFactors(PositionFactors):
    """``g_i[v] = sum_{t: idx_t = v} gy_t``: row ``v`` of the table gets the backprops of the positions that read it.

    Attributes:
        indices: ``[n, T]``, int64 or int32.
        backprops: ``[n, T, d]``.
        num_embeddings: rows of the table.
        padding_idx: positions of this index have no gradient; a number that is no row of the table stands for none.
        sparse: whether the weighted sum is a sparse tensor, as the gradient of ``nn.Embedding(sparse=True)`` is.
    """

    by_example: ClassVar[tuple[str, ...]] = ("indices", "backprops")

    indices: Tensor
    backprops: Tensor
    num_embeddings: int
    padding_idx: int = -1
    sparse: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.padding_idx < self.num_embeddings:
            self.padding_idx = -1

    @property
    def gradient_shape(self) -> tuple[int, ...]:
        return self.num_embeddings, self.backprops.shape[2]

    @property
    def may_be_formed(self) -> bool:
        return not self.sparse

    def squared_norm(self) -> Tensor:
        return ops.embedding_norm_sq(self.indices, self.backprops, self.padding_idx)

    def to_scale(self) -> Tensor:
        return self.backprops

    def sum_of_scaled(self, scaled: Tensor) -> Tensor:
        scaled = scaled.to(accumulation_dtype(scaled))
        return torch.ops.aten.embedding_backward(
            scaled, self.indices, self.num_embeddings, self.padding_idx, False, self.sparse
        )

    def dense(self, rows: slice) -> Tensor:
        indices, backprops = self.indices[rows], self.without_padding().backprops[rows]
        n, size = indices.shape[0], self.num_embeddings
        own = indices + size * torch.arange(n, device=indices.device).unsqueeze(1)  # rows of n tables in one
        backprops = backprops.to(accumulation_dtype(backprops))
        return torch.ops.aten.embedding_dense_backward(backprops, own, n * size, -1, False).unflatten(0, (n, size))

    def without_padding(self) -> EmbeddingFactors:
        """An equal term without a padding index, in which the gradients at padded positions are zero."""
        if self.padding_idx < 0:
            return self
        kept = self.backprops.masked_fill((self.indices == self.padding_idx).unsqueeze(2), 0)
        return EmbeddingFactors(self.indices, kept, self.num_embeddings, -1, self.sparse)

    def joined(self, others: Sequence[Self], dim: int = 1) -> Self:
        uses: list[Self] = [self, *others]
        sparse = all(use.sparse for use in uses)
        if len({use.padding_idx for use in uses}) > 1:
            uses = [use.without_padding() for use in uses]  # type: ignore[misc]
        total = super(EmbeddingFactors, uses[0]).joined(uses[1:], dim)
        total.sparse = sparse
        return total


@dataclass
class TiedTable(RowTerm):
    """One matrix as the table of an embedding and the weight of a linear layer: a language model's input and output.

    Attributes:
        embedding: the term of all look-ups.
        linear: the term of all projections; its backprops are ``[n, S, num_embeddings]``.
    """

    embedding: EmbeddingFactors
    linear: LinearFactors

    @property
    def examples(self) -> int:
        return self.embedding.examples

    @property
    def gradient_shape(self) -> tuple[int, ...]:
        return self.linear.gradient_shape

    def held(self) -> list[Tensor]:
        return [*self.embedding.held(), *self.linear.held()]

    def selected(self, rows: Tensor, padding: Tensor | None) -> TiedTable:
        return TiedTable(self.embedding.selected(rows, padding), self.linear.selected(rows, padding))

    @property
    def alike(self) -> Hashable:
        return TiedTable, self.embedding.row_length, self.linear.row_length

    def concatenated(self, others: Sequence[TiedTable]) -> TiedTable:
        embedding = self.embedding.concatenated([other.embedding for other in others])
        return TiedTable(embedding, self.linear.concatenated([other.linear for other in others]))

    def squared_norm(self) -> Tensor:
        """The squared norms of the rows that an example looked up, and of the others, which add up.

        To a row that was looked up the projection gives a sum over its positions, which is added to the backprops of
        the look-ups. So nothing cancels but within a row, and no gradient of the table's size is formed, unless the
        table is smaller than the ``[S, T]`` products.
        """
        looked_up, positions = self.embedding.indices.shape[1], self.linear.activations.shape[1]
        width, size = self.linear.activations.shape[2], self.linear.backprops.shape[2]
        if width * size <= looked_up * positions:
            return squared_norm_of_dense(self)
        each = max(positions * size, looked_up * (looked_up + 2 * positions + 2 * width))
        chunk = max(1, CHUNK_BYTES // max(1, each * accumulation_dtype(self.linear.backprops).itemsize))
        return torch.cat([self._chunk(slice(start, start + chunk)) for start in range(0, self.examples, chunk)])

    def _chunk(self, rows: slice) -> Tensor:
        """The squared norms of some examples, ``[rows]``."""
        embedding, dtype = self.embedding.without_padding(), accumulation_dtype(self.embedding.backprops)
        a, b, gy = (t[rows] for t in (self.linear.activations, self.linear.backprops, embedding.backprops))
        indices = embedding.indices[rows].long()
        columns = indices.unsqueeze(1).expand(-1, b.shape[1], -1)
        times = (indices.unsqueeze(2) == indices.unsqueeze(1)).sum(2, keepdim=True)  # that its row was looked up
        projected = b.gather(2, columns).to(dtype).mT @ a.to(dtype)
        others = LinearFactors(a, b.scatter(2, columns, 0))
        return others.squared_norm() + ops.embedding_norm_sq(indices, gy.to(dtype) + projected / times, -1)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.linear.weighted_sum(weights) + self.embedding.weighted_sum(weights)

    def dense(self, rows: slice) -> Tensor:
        return self.linear.dense(rows) + self.embedding.dense(rows)

    def _folded(self, outer: int, n: int, inner: int) -> Term:
        return TiedTable(self.embedding._folded(outer, n, inner), self.linear._folded(outer, n, inner))
