"""Per-example gradients for an operator without a rule: its own backward pass is run once for every example.

An operator's backward pass is linear in the gradients of its outputs. So with the rows of one example kept and all
others set to zero it gives that example's gradient, for any operator whose rows each belong to one example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..terms import CHUNK_BYTES, PerExampleGradient
from ..terms.layout import Layout
from ..terms.owners import Owners
from ..torch_internals import adds_up, passed_to_input
from .entries import Entry


def masked_gradients(entry: Entry, backprops: Sequence[Tensor | None]) -> PerExampleGradient:
    """Per-example gradients of what enters at a node, from the node's own backward pass on one example at a time.

    Several examples are computed at once where vmap can do that. This must not be called while a backward pass runs,
    because that pass decides for its nodes which gradients they compute.

    Args:
        entry: where the tensor enters.
        backprops: gradients of the summed losses with respect to the node's outputs; None where there is none.

    Returns:
        The gradients ``[n, *entry.shape]``.
    """
    if isinstance(entry.layout, Owners):
        return _masked(entry, backprops)
    rows = [None if g is None else entry.layout.examples_first(g.detach(), entry.n) for g in backprops]
    each = max(1, sum(r.numel() * r.element_size() for r in rows if r is not None))
    chunk = max(1, min(entry.n, CHUNK_BYTES // each))

    shape = tuple(reversed(entry.shape)) if entry.transposed else entry.shape

    def of(gradients: Sequence[Tensor | None]) -> Tensor | None:
        found = passed_to_input(entry.node, entry.slot, gradients)
        return None if found is None else found.sum_to_size(shape)  # in a backward pass autograd does so

    found: list[Tensor] = []
    for start in range(0, entry.n, chunk):
        picked = range(start, min(start + chunk, entry.n))
        masked = [None if r is None else torch.stack([_only(r, i, entry.layout) for i in picked]) for r in rows]
        found.append(backward_of_each(of, masked, shape))
    gradient = torch.cat(found)
    return PerExampleGradient(gradient.mT if entry.transposed else gradient)


def _masked(entry, backprops):
    shape = tuple(reversed(entry.shape)) if entry.transposed else entry.shape

    def of(gradients):
        found = passed_to_input(entry.node, entry.slot, gradients)
        return None if found is None else found.sum_to_size(shape)

    layouts = (entry.layout, *entry.others)
    masked = []
    for g, o in zip(backprops, layouts):
        if g is None:
            masked.append(None)
            continue
        if isinstance(o, Layout):
            rows = o.examples_first(g, entry.n)
            masked.append(torch.stack([_only(rows, i, o) for i in range(entry.n)]))
        else:
            masked.append(torch.stack([g * (o.elements(g.dim()) == i) for i in range(entry.n)]))
    gradient = backward_of_each(of, masked, shape)
    return PerExampleGradient(gradient.mT if entry.transposed else gradient)


def _only(rows: Tensor, example: int, layout: Layout) -> Tensor:
    """A gradient of the node's output that is zero outside of one example's rows, given ``rows [n, rows, ...]``."""
    kept = torch.zeros_like(rows)
    kept[example] = rows[example]
    return layout.from_examples(kept)


def backward_of_each(
    backward: Callable[[Sequence[Tensor | None]], Tensor | None],
    gradients: Sequence[Tensor | None],
    shape: tuple[int, ...],
) -> Tensor:
    """``backward`` of every entry of a batch of output gradients, by vmap or, where vmap fails, in a loop.

    The result of vmap is used only if it adds up to ``backward`` of the sum (:func:`engm.torch_internals.adds_up`).

    Args:
        backward: from gradients of the outputs to the gradient ``[*shape]`` of one input, or None for zero.
        gradients: ``[batch, ...]`` for every output; None where there is none.
        shape: of the input.

    Returns:
        ``[batch, *shape]``.
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
            pass  # an operator has no batching rule; if the error has another reason, the loop below raises it again
        else:
            if adds_up(batched, one(*(g.sum(0) for g in given))):
                return batched
    return torch.stack([one(*(g[i] for g in given)).detach() for i in range(given[0].shape[0])])
