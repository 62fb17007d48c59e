"""What will an analysis cost, given the time of a training step of every kind of run that it needs?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..methods import LABELS
from .cells import Cell
from .measures import evaluation_passes
from .step_times import READ_NORMS, WARM_UP, StepTimeCell

# Runs that differ in none of these settings are of one kind, and a step of theirs costs the same.
_KIND = (
    "data", "train_examples", "model", "width", "norm", "objective", "awp", "attack_steps", "batch_size", "precision",
    "channels_last", "compile_attack", "fast", "threads",
)  # fmt: skip


@dataclass(frozen=True)
class KindCost:
    """What one kind of run costs.

    Attributes:
        step: seconds of a training step.
        steps: training steps an epoch.
        validation: number of validation examples.
        test: number of test examples.
    """

    step: float
    steps: int
    validation: int
    test: int


@dataclass(frozen=True)
class Expense:
    """What an analysis will cost.

    Attributes:
        cells: number of its cells.
        trained: number of its cells whose training is over.
        seconds: time expected for the rest, one cell after the other; measures of trained cells are counted in.
        peak_bytes: the most memory that one cell holds, on the GPU if there is one; ``None`` where nothing was run
            for the answer.
        jobs: number of cells at once.
        on_gpu: whether the cells compute on a GPU.
    """

    cells: int
    trained: int
    seconds: float
    peak_bytes: int | None
    jobs: int
    on_gpu: bool

    def __str__(self) -> str:
        left = self.cells - self.trained
        # Cells on one GPU share what one of them leaves idle, and nobody knows how much that is.
        wall = self.seconds / (1 if self.on_gpu else max(1, min(self.jobs, self.cells)))
        said = f"{self.cells} cells, {left} still to train, {self.jobs} at a time: about {duration(wall)}"
        if self.peak_bytes is None:
            return (
                f"{said}. From operation counts and the speed of this machine, so good to a factor of three or "
                "four; a few steps of each kind of run are timed before the analysis starts."
            )
        return (
            f"{said}, {self.peak_bytes * self.jobs / 2**30:.1f} GiB of memory. From a few steps of each kind of run, "
            "so good to a factor of two."
        )


def duration(seconds: float) -> str:
    """A time as people read it: ``90 s``, ``12 min``, ``3.5 h``, ``4 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


def kind_of(config: RunConfig) -> tuple[Any, ...]:
    """What runs have in common that cost the same a step."""
    resolved = config.resolved()
    return tuple(getattr(resolved, name) for name in _KIND)


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds_of(cell: Cell, cost: KindCost, runs: Path) -> float:
    """The time that is left of a cell, its measures included."""
    config = cell.config.resolved()
    trained = cell.is_trained(runs)
    if isinstance(cell, StepTimeCell):
        contenders = len(LABELS) + len(READ_NORMS)
        return 0.0 if trained else cost.step * (cell.steps + WARM_UP) * contenders
    per_pass = cost.step / (config.batch_size * (config.attack_steps + 2))
    passes = sum(measure.passes(config) for measure in cell.measures)
    if trained:
        return passes * per_pass
    natural = 2 / (config.attack_steps + 2) if config.eps == 0 else 1.0
    looks = len(range(config.evaluate_every, config.epochs + 1, config.evaluate_every))
    passes += looks * evaluation_passes(config, cost.validation) + 2 * evaluation_passes(config, cost.test)
    return natural * config.epochs * cost.steps * cost.step + passes * per_pass
