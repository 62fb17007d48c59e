"""Which examples of an attack still move, and which stay because they are misclassified."""

from __future__ import annotations

import torch
from torch import Tensor

from .ball import per_example


class Standing:
    """Which examples still move: one that is found misclassified with no patience left stays where it is.

    Args:
        labels: ``[n]``.
        patience: steps that an example still takes after it was misclassified.

    Attributes:
        moving: ``[n]`` bool.
    """

    def __init__(self, labels: Tensor, patience: int) -> None:
        self.moving = torch.ones_like(labels, dtype=torch.bool)
        self._labels = labels
        self._patience = torch.full_like(labels, patience, dtype=torch.long)

    def look(self, logits: Tensor, rows: Tensor | slice = slice(None)) -> None:
        """Takes note of the logits ``[k, K]`` of the examples in ``rows [k]``, by default all, where these are now."""
        wrong = logits.argmax(dim=1) != self._labels[rows]
        self.moving[rows] &= ~(wrong & (self._patience[rows] == 0))
        self._patience[rows] -= wrong.long()


def moved_or_left(standing: Standing, logits: Tensor, moved: Tensor, present: Tensor) -> Tensor:
    """``moved`` for the examples that still stand by their logits at ``present``, which is where the others stay."""
    standing.look(logits)
    return torch.where(per_example(standing.moving, moved), moved, present)
