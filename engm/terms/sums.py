"""Weighted sums over examples of many terms."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .. import ops
from .base import Factors, PerExampleGradient, Term


def weighted_sums(
    terms: list[tuple[Tensor, Term]], weights: Tensor, scaled_at_once: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """``(parameter, sum_i weights_i g_i)`` for every ``(parameter, term)``; the list is emptied on the way.

    Examples are weighted in groups of terms, on CUDA in one launch each: all gradients that were kept whole go
    together, because nothing of them is copied, and factors by as many as their scaled copies may take.

    Args:
        terms: emptied.
        weights: ``[n]``.
        scaled_at_once: bytes of scaled factors that may be held; a factor that takes more goes alone.
    """
    terms.sort(key=lambda item: isinstance(item[1], Factors))
    while terms:
        group = [terms.pop(0)]
        held = _bytes_to_scale(group[0])
        while terms and held + _bytes_to_scale(terms[0]) <= scaled_at_once:
            held += _bytes_to_scale(terms[0])
            group.append(terms.pop(0))
        yield from _sums_of_group(group, weights)


def _bytes_to_scale(item: tuple[Tensor, Term]) -> int:
    return item[1].to_scale().nbytes if isinstance(item[1], Factors) else 0


def _sums_of_group(group: list[tuple[Tensor, Term]], weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of terms that fit together; what is used is let go as early as can be."""
    whole = {parameter: term.gradient for parameter, term in group if isinstance(term, PerExampleGradient)}
    factors = [(parameter, term) for parameter, term in group if isinstance(term, Factors)]
    others = [(parameter, term) for parameter, term in group if not isinstance(term, PerExampleGradient | Factors)]
    group.clear()
    parameters, sums = list(whole), ops.weighted_sums(list(whole.values()), weights) if whole else []
    whole.clear()
    yield from zip(parameters, sums, strict=True)
    scaled = ops.scale_examples([term.to_scale() for _, term in factors], weights) if factors else []
    while factors:
        parameter, term = factors.pop(0)
        yield parameter, term.sum_of_scaled(scaled.pop(0))
    for parameter, other in others:
        yield parameter, other.weighted_sum(weights)
