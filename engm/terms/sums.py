"""How the weighted sums of many terms are formed, few launches and little memory at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .. import ops
from .base import PerExampleGradient, Term
from .factors import Factors


def weighted_sums(
    terms: list[tuple[Tensor, Term]], weights: Tensor, scaled_at_once: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """``(parameter, sum_i weights_i g_i)`` for every ``(parameter, term)``.

    Terms are summed in groups. On CUDA one launch weights all gradients of a group that were kept whole, and one all of
    its factors. The former are all in the first group, because nothing of them is copied; factors are grouped by the
    memory that their scaled copies take.

    Args:
        terms: parameters and their terms; the list is emptied on the way, so that memory is let go as early as can be.
        weights: ``[n]``.
        scaled_at_once: bytes of scaled factors that may be held; a factor that takes more is a group of its own.
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
    """The weighted sums of one group, which is emptied: every term is let go as soon as its sum is formed."""
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
