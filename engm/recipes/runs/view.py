"""Who watches a run while it trains."""

from __future__ import annotations

from typing import Protocol

from ..training.run import Run


class View(Protocol):
    """Who watches a run."""

    def begin(self, run: Run) -> None:
        """The run is about to train, from ``run.epoch`` and ``run.batch``."""

    def on_step(self) -> None:
        """A batch is done."""

    def on_epoch(self) -> None:
        """An epoch is done; its figures are the last row of ``run.history``."""

    def on_test(self) -> None:
        """Training is over; the test set is about to be looked at."""

    def on_evaluation(self, done: int, total: int) -> None:
        """So many of the batches of the validation or test set have been looked at."""


class NoView:
    """Watches nothing."""

    def begin(self, run: Run) -> None:
        """Ignored."""

    def on_step(self) -> None:
        """Ignored."""

    def on_epoch(self) -> None:
        """Ignored."""

    def on_test(self) -> None:
        """Ignored."""

    def on_evaluation(self, done: int, total: int) -> None:
        """Ignored."""
