"""What a terminal shows while methods train: a bar and the latest figures of each."""

from __future__ import annotations

from statistics import median
from typing import Self

from rich.console import Console, Group
from rich.table import Table

from ..runs.progress import LiveDisplay, progress_bar
from .side_by_side import Demo


class LiveView(LiveDisplay):
    """``with LiveView(demo, console) as view:``; pass ``view.on_step`` and ``view.on_epoch`` to the run.

    In a terminal the view redraws itself; anywhere else it prints one line at each look at the validation set.
    """

    def __init__(self, demo: Demo, console: Console) -> None:
        super().__init__(console)
        self._demo = demo
        training = demo.settings.training
        steps = training.epochs * (len(demo.dataset.train) // training.batch_size)
        self._progress = progress_bar(console)
        self._task = self._progress.add_task(f"epoch 1/{training.epochs}", total=steps)

    def __enter__(self) -> Self:
        self.show(self._picture())
        return self

    def on_step(self) -> None:
        """A batch is done."""
        self._progress.advance(self._task)

    def on_epoch(self, epoch: int) -> None:
        """That many epochs are done."""
        epochs = self._demo.settings.training.epochs
        text = "testing" if epoch == epochs else f"epoch {epoch + 1}/{epochs}"
        self._progress.update(self._task, description=text)
        if not self.show(self._picture()) and all(epoch in run.validation for run in self._demo.runs):
            figures = "  ".join(f"{run.label} {run.validation[epoch].robust:5.1%}" for run in self._demo.runs)
            self.console.print(f"epoch {epoch:3d}/{epochs}  validation under PGD-20:  {figures}")

    def _picture(self) -> Group:
        figures = Table(box=None)
        figures.add_column("Method")
        for name in ("loss", "natural", "PGD-20", "best", "mean w", "s/step"):
            figures.add_column(name, justify="right")
        for run in self._demo.runs:
            if not run.epochs:
                figures.add_row(run.label, *["-"] * 6)
                continue
            record = run.epochs[-1]
            looked = list(run.validation.values())
            figures.add_row(
                run.label,
                f"{record.loss:.3f}",
                f"{looked[-1].natural:.1%}" if looked else "-",
                f"{looked[-1].robust:.1%}" if looked else "-",
                f"{run.best.score:.1%}" if looked else "-",
                f"{record.mean_weight:.2f}",
                f"{median(record.step_seconds):.3f}",
            )
        return Group(figures, self._progress)
