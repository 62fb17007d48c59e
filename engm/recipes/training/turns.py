"""Several trainers on the same batches, step by step: their times are then taken in the same state of the machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from torch import Tensor


class Steps(Protocol):
    """Whatever trains on a batch at a time, as :class:`~engm.recipes.training.trainer.Trainer` does."""

    def step(self, x: Tensor, y: Tensor) -> None:
        """Trains on one batch."""


def take_turns(trainers: Sequence[Steps], batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Every trainer takes a batch before any of them takes the next.

    The trainer that goes first changes with every batch, so that none always meets cold caches.

    Args:
        trainers: at least one.
        batches: inputs ``[n, ...]`` and labels ``[n]``, for all of the trainers.

    Yields:
        ``None`` after every batch.
    """
    for number, (x, y) in enumerate(batches):
        first = number % len(trainers)
        for trainer in (*trainers[first:], *trainers[:first]):
            trainer.step(x, y)
        yield
