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
        """The sum of both squared norms and twice the inner product of the two gradients.

        The inner product is ``sum_{t,s} B[s, idx_t] <A_s, gy_t>``, so no gradient of the table's size is formed, unless
        the table is smaller than the ``[S, T]`` products. Where an example's two gradients nearly cancel, a sum of
        squares and products loses their difference to rounding.
        """
        positions, size = self.embedding.indices.shape[1] * self.linear.activations.shape[1], self._table_size()
        if size <= positions:
            return squared_norm_of_dense(self)
        own = self.embedding.squared_norm() + self.linear.squared_norm()
        chunk = max(1, CHUNK_BYTES // max(1, 2 * positions * own.element_size()))
        cross = [self._cross(slice(start, start + chunk)) for start in range(0, self.examples, chunk)]
        return (own + 2 * torch.cat(cross)).clamp_min(0)

    def _table_size(self) -> int:
        return self.linear.activations.shape[2] * self.linear.backprops.shape[2]

    def _cross(self, rows: slice) -> Tensor:
        """``<g_i of the embedding, g_i of the linear layer>``, ``[rows]``."""
        embedding = self.embedding.without_padding()
        a, b, gy = (t[rows] for t in (self.linear.activations, self.linear.backprops, embedding.backprops))
        read = embedding.indices[rows].unsqueeze(1).expand(-1, b.shape[1], -1)
        dtype = accumulation_dtype(gy)
        inner = torch.bmm(a.to(dtype), gy.to(dtype).mT)
        return (b.gather(2, read.long()) * inner).sum((1, 2))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.linear.weighted_sum(weights) + self.embedding.weighted_sum(weights)

    def dense(self, rows: slice) -> Tensor:
        return self.linear.dense(rows) + self.embedding.dense(rows)

    def _folded(self, outer: int, n: int, inner: int) -> Term:
        return TiedTable(self.embedding._folded(outer, n, inner), self.linear._folded(outer, n, inner))
