"""Which examples of an attack still move, and which stay because they are hard enough already."""

from __future__ import annotations

import torch
from torch import Tensor

from .ball import per_example
from .losses import probability_gap


class Standing:
    """Which examples still move: one that is found broken with no patience left stays where it is.

    Args:
        labels: ``[n]``.
        patience: steps that an example still takes after it was broken.
        gap: an example is broken where :func:`probability_gap` is above this; ``None``: where it is misclassified.

    Attributes:
        moving: ``[n]`` bool.
    """

    def __init__(self, labels: Tensor, patience: int, gap: float | None = None) -> None:
        self.moving = torch.ones_like(labels, dtype=torch.bool)
        self._labels = labels
        self._gap = gap
        self._patience = torch.full_like(labels, patience, dtype=torch.long)

    def look(self, logits: Tensor, rows: Tensor | slice = slice(None)) -> None:
        """Takes note of the logits ``[k, K]`` of the examples in ``rows [k]``, by default all, where these are now."""
        labels = self._labels[rows]
        broken = logits.argmax(dim=1) != labels if self._gap is None else probability_gap(logits, labels) > self._gap
        self.moving[rows] &= ~(broken & (self._patience[rows] == 0))
        self._patience[rows] -= broken.long()


def moved_or_left(standing: Standing, logits: Tensor, moved: Tensor, present: Tensor) -> Tensor:
    """``moved`` for the examples that still stand by their logits at ``present``, which is where the others stay."""
    standing.look(logits)
    return torch.where(per_example(standing.moving, moved), moved, present)
