"""The rule of every operator that has none of its own: the operator's own backward pass, run once an example."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..terms import (
    CHUNK_BYTES,
    PerExampleGradient,
)
from ..terms.layout import Layout
from ..torch_internals import adds_up, passed_to_input
from .entries import Entry


def masked_gradients(entry: Entry, backprops: Sequence[Tensor | None]) -> PerExampleGradient:
    """The node's own backward pass with the rows of one example at a time, in batched chunks where that works.

    Not to be called while a backward pass runs, which decides for its nodes what they compute.
    """
    rows = [None if g is None else entry.layout.examples_first(g.detach(), entry.n) for g in backprops]
    each = max(1, sum(r.numel() * r.element_size() for r in rows if r is not None))
    chunk = max(1, min(entry.n, CHUNK_BYTES // each))

    shape = tuple(reversed(entry.shape)) if entry.transposed else entry.shape

    def of(gradients: Sequence[Tensor | None]) -> Tensor | None:
        found = passed_to_input(entry.node, entry.slot, gradients)
        return None if found is None else found.sum_to_size(shape)  # the engine would see to that

    found: list[Tensor] = []
    for start in range(0, entry.n, chunk):
        picked = range(start, min(start + chunk, entry.n))
        masked = [None if r is None else torch.stack([_only(r, i, entry.layout) for i in picked]) for r in rows]
        found.append(backward_of_each(of, masked, shape))
    gradient = torch.cat(found)
    return PerExampleGradient(gradient.mT if entry.transposed else gradient)


def _only(rows: Tensor, example: int, layout: Layout) -> Tensor:
    """The gradient that has the rows of one example alone."""
    kept = torch.zeros_like(rows)
    kept[example] = rows[example]
    return layout.from_examples(kept)


def backward_of_each(
    backward: Callable[[Sequence[Tensor | None]], Tensor | None],
    gradients: Sequence[Tensor | None],
    shape: tuple[int, ...],
) -> Tensor:
    """``backward`` of every entry of a batch of output gradients, ``[batch, *shape]``; a loop where vmap cannot.

    What vmap gives is believed if it adds up to ``backward`` of the sum (:func:`engm.torch_internals.adds_up`).
    """
    given = [g for g in gradients if g is not None]

    def one(*parts: Tensor) -> Tensor:
        rest = iter(parts)
        found = backward([None if g is None else next(rest) for g in gradients])
        return parts[0].new_zeros(shape) if found is None else found

    if given[0].shape[0] > 1:
        try:
            batched = torch.func.vmap(one)(*given)
        except (RuntimeError, ValueError):
            pass  # no batching rule for something on the way: one by one, which will tell if that is not the reason
        else:
            if adds_up(batched, one(*(g.sum(0) for g in given))):
                return batched
    return torch.stack([one(*(g[i] for g in given)).detach() for i in range(given[0].shape[0])])
