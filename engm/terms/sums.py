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

    On CUDA one launch weights all gradients that were kept whole, because nothing of them is copied, and one launch all
    factors of a group: factors are grouped by the memory that their scaled copies take.

    Args:
        terms: parameters and their terms; the list is emptied on the way, so that memory is let go as early as can be.
        weights: ``[n]``.
        scaled_at_once: bytes of scaled factors that may be held; a factor that takes more is a group of its own.
    """
    whole = [(parameter, term.gradient) for parameter, term in terms if isinstance(term, PerExampleGradient)]
    factors = [(parameter, term, term.to_scale()) for parameter, term in terms if isinstance(term, Factors)]
    others = [item for item in terms if not isinstance(item[1], PerExampleGradient | Factors)]
    terms.clear()
    if whole:
        parameters, gradients = map(list, zip(*whole, strict=True))
        whole.clear()
        sums = ops.weighted_sums(gradients, weights)
        gradients.clear()
        yield from zip(parameters, sums, strict=True)
    while others:
        parameter, other = others.pop(0)
        yield parameter, other.weighted_sum(weights)
    factors.reverse()  # the next one is the last, which is quick to take away
    while factors:
        group = [factors.pop()]
        held = group[0][2].nbytes
        while factors and held + factors[-1][2].nbytes <= scaled_at_once:
            held += factors[-1][2].nbytes
            group.append(factors.pop())
        yield from _sums_of_group(group, weights)


def _sums_of_group(group: list[tuple[Tensor, Factors, Tensor]], weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The weighted sums of factors, given with those that are scaled; terms of one kind side by side are let go of."""
    scaled = ops.scale_examples([to_scale for _, _, to_scale in group], weights)
    while group:
        kind, count = type(group[0][1]), 1
        while count < len(group) and type(group[count][1]) is kind:
            count += 1
        parameters, terms, factors = map(list, zip(*group[:count], strict=True))
        sums = kind.sums_of_scaled(terms, factors, scaled[:count])
        del group[:count], scaled[:count], terms, factors
        yield from zip(parameters, sums, strict=True)
