"""What a terminal shows while a run trains: a bar with steps a second, and the latest epochs."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ..methods import label_of
from ..spelling import shown_radius
from ..training.recorded import EAGER
from ..training.run import Run

SHOWN_EPOCHS = 8
LITTLE_WEIGHT = 0.1  # mean, of the examples of the first epoch
RATE_OVER = 50  # steps that the rate is taken over


def progress_bar(console: Console, *columns: ProgressColumn, transient: bool = False) -> Progress:
    """What is going on, how far it is, ``columns`` of one's own, time taken and time left.

    Args:
        console: where to draw; nothing is drawn there until the end if that is no terminal.
        columns: shown between how far it is and the time taken.
        transient: leave nothing behind.
    """
    first = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*first, *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=transient)


class LiveDisplay:
    """Something that a terminal redraws until the context ends; anywhere else nothing is drawn.

    Args:
        console: where to draw.

    Attributes:
        console: where the picture is drawn.
        waiting_for: what a spinner says until there is a picture; nothing turns where this is empty.
    """

    waiting_for = ""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._shown = False

    def __enter__(self) -> Self:
        if self._live is not None and self.waiting_for:
            self._live.update(Spinner("dots", self.waiting_for))
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            if not self._shown:
                self._live.update(Text(""))
            self._live.stop()

    def show(self, picture: Group) -> bool:
        """Draws in a terminal.

        Returns:
            Whether there is one.
        """
        if self._live is None:
            return False
        self._shown = True
        self._live.update(picture)
        self._live.start()  # does nothing from the second time on
        return True


class RunView(LiveDisplay):
    """``with RunView(console) as view:``; a :class:`engm.recipes.runs.folder.View`.

    In a terminal the view redraws itself; anywhere else it prints a line an epoch.

    Args:
        console: where to draw.
        title: put before everything that it says, to tell runs apart.
        opening: the first line that it says, once nothing is left that could refuse the run.

    Attributes:
        run: the run that it watches, once that has begun.
    """

    waiting_for = "loading data and making the network"

    def __init__(self, console: Console, title: str = "", opening: str = "") -> None:
        super().__init__(console)
        self._title = title
        self._opening = opening
        self.run: Run | None = None
        self._stamps: deque[float] = deque(maxlen=RATE_OVER)
        self._progress = progress_bar(console, TextColumn("{task.fields[rate]}"))

    def begin(self, run: Run) -> None:
        """Says what is trained, and from where."""
        self.run = run
        config, data = run.config, run.dataset
        if self._opening:
            self.console.print(self._opening, highlight=False, soft_wrap=True)
        alpha = f"{run.alpha:.3g}" if isinstance(run.alpha, float) else run.alpha
        threshold = "" if alpha is None else f", alpha {alpha}"
        awp = f" with AWP {config.awp_gamma:g}" if config.awp else ""
        self.console.print(
            f"{self._title}{data.name}: {len(data.train)} training, {len(data.validation)} validation, "
            f"{len(data.test)} test images. {config.model} ({config.norm} norm) of "
            f"{sum(p.numel() for p in run.net.parameters()):,} parameters; {config.objective}{awp}, "
            f"{config.threat} {shown_radius(config.eps or 0.0)}, {config.attack_steps} steps; "
            f"{label_of(config.optimizer)}{threshold}; {_processes(run)}.",
            highlight=False,
            soft_wrap=True,
        )
        if data.extra is not None:
            self.console.print(
                f"{self._title}{config.extra_fraction:.0%} of every batch are of the {len(data.extra)} extra images in "
                f"{config.extra}",
                highlight=False,
                soft_wrap=True,
            )
        if run.started_from is not None and not run.trainer.steps:
            self.console.print(
                f"{self._title}starting from {run.started_from.source}: {run.started_from}",
                highlight=False,
                soft_wrap=True,
            )
        if run.trainer.steps:
            self.console.print(f"{self._title}going on after step {run.trainer.steps} of {run.steps}", highlight=False)
        self._task = self._progress.add_task("", total=run.steps, completed=run.trainer.steps, rate="")
        self._describe()
        self.show(self.picture())

    def on_step(self) -> None:
        """A batch is done."""
        self._stamps.append(time.monotonic())
        passed = self._stamps[-1] - self._stamps[0]
        rate = f"{(len(self._stamps) - 1) / passed:.2f} steps/s" if passed > 0 else ""
        self._progress.update(self._task, advance=1, rate=rate)
        self._describe()

    def on_epoch(self) -> None:
        """An epoch is done."""
        self._stamps.clear()  # the evaluation is no part of the rate
        if self.run is None:
            return
        self._hint(self.run)
        if not self.show(self.picture()):
            row = self.run.history[-1]
            figures = "  ".join(f"{name} {text}" for name, text in list(cells(row).items())[1:])
            number = f"epoch {row['epoch']:3d}/{self.run.config.epochs}"
            self.console.print(f"{self._title}{number}  {figures}", highlight=False, soft_wrap=True)
        if self.run.epoch == 1:
            self._say_steps(self.run)

    def _hint(self, run: Run) -> None:
        """Says once if next to nothing is left of the gradients: then the learning rate means something else."""
        weight = run.history[-1]["weight_mean"]
        if run.epoch == 1 and weight < LITTLE_WEIGHT and isinstance(run.alpha, float):
            self.console.print(
                f"{self._title}the weights average {weight:.2g}: alpha {run.alpha:.3g} clips nearly everything, as a "
                "far smaller learning rate would. The paper's alpha is of ResNet-18 on CIFAR-10; --alpha auto, in "
                "another --out, follows the norms of this network.",
                style="yellow",
                highlight=False,
                soft_wrap=True,
            )

    def _say_steps(self, run: Run) -> None:
        """Says how the steps ran, where they were to be recorded."""
        if run.config.step != EAGER:
            self.console.print(f"{self._title}{run.trainer.step_report()}", highlight=False, soft_wrap=True)

    def on_test(self) -> None:
        """Training is over."""
        if self.run is not None and self.run.epoch > 1:
            self._say_steps(self.run)
        self._progress.update(self._task, description=f"{self._title}testing", rate="")

    def on_evaluation(self, done: int, total: int) -> None:
        """So many of the batches of the validation or test set have been looked at."""
        if self.run is not None:
            what = "testing" if self.run.over else f"validating epoch {self.run.epoch}"
            self._progress.update(self._task, description=f"{self._title}{what}, batch {done} of {total}")

    def _describe(self) -> None:
        if self.run is not None:
            epoch = min(self.run.epoch + 1, self.run.config.epochs)
            self._progress.update(self._task, description=f"{self._title}epoch {epoch}/{self.run.config.epochs}")

    def picture(self) -> Group:
        """The latest epochs (the best in bold) and the bar."""
        table = Table(box=None)
        run = self.run
        rows = [] if run is None else run.history[-SHOWN_EPOCHS:]
        headings = list(cells(rows[-1])) if rows else []
        for index, name in enumerate(headings):
            table.add_column(name, justify="right" if index else "left")
        for row in rows:
            best = run is not None and run.best is not None and run.best.epoch == row["epoch"]
            shown = cells(row)
            table.add_row(*(shown.get(name, "-") for name in headings), style="bold" if best else None)
        return Group(table, self._progress)


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A row of a run's history as the table shows it, by the headings of its columns.

    Where weights are averaged, "plain" is the accuracy under attack of those that train. Where alpha follows the norms,
    the row says which it was at the end of the epoch.
    """
    weight = row["weight_mean"]
    alpha = {"alpha": f"{row['alpha']:.3g}"} if "alpha" in row else {}
    plain = {"plain": _percent(row["plain_robust"])} if "plain_robust" in row else {}
    return {
        "epoch": str(row["epoch"]),
        "loss": f"{row['loss']:.3f}",
        **alpha,
        "mean w": f"{weight:.3f}" if weight < 100 else f"{weight:.1e}",
        "clipped": f"{row['clipped']:.0%}",
        "natural": _percent(row["natural"]),
        "PGD": _percent(row["robust"]),
        **plain,
        "lr": f"{row['lr']:.4g}",
        "s/step": f"{row['step_seconds']:.3f}",
    }


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.1%}"


def _processes(run: Run) -> str:
    where = str(run.processes.device)
    return where if run.processes.world == 1 else f"{run.processes.world} processes on {run.processes.device.type}"
