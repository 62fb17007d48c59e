"""What an analysis will cost, judged by a few training steps of every kind of run that it needs."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config import RunConfig
from ..data.memory import free_bytes
from ..machine import set_machine
from ..methods import LABELS
from ..processes import Processes
from ..training.run import Run
from .cells import Cell, dataset_of
from .measures import evaluation_passes
from .step_times import READ_NORMS, WARM_UP, StepTimeCell

LONG = 2.0  # seconds; a longer step is not timed with a whole batch
MOST_JOBS = 8  # cells at once on one GPU
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
                f"{said}. From operation counts and the speed of a convolution here, so good to a factor of three or "
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


def expense_of(
    cells: Sequence[Cell],
    runs: Path,
    device: torch.device,
    jobs: int | None,
    on_kind: Callable[[int, int], None] = lambda done, total: None,
) -> Expense:
    """Times a few steps of every kind of run, in a process of its own, so that its memory can be told.

    Args:
        cells: the cells of the analysis.
        runs: the folder of run folders.
        device: where the cells will compute.
        jobs: number of cells at once; ``None`` for as many as cores (by the runs' threads) or the GPU's memory allow.
        on_kind: called with the number of kinds of run that are timed, and of all.
    """
    kinds = {kind_of(cell.config): cell.config for cell in cells}
    costs: dict[tuple[Any, ...], KindCost] = {}
    peak = 0
    on_kind(0, len(kinds))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for kind, config in kinds.items():
            costs[kind], held = pool.submit(_probe, config, str(device)).result()
            peak = max(peak, held)
            on_kind(len(costs), len(kinds))
    trained = sum(cell.is_trained(runs) for cell in cells)
    seconds = sum(seconds_of(cell, costs[kind_of(cell.config)], runs) for cell in cells)
    threads = max((cell.config.threads or cores() for cell in cells), default=1)
    room = jobs or _room(device, peak, threads, len(cells))
    return Expense(len(cells), trained, seconds, peak, room, device.type == "cuda")


def kind_of(config: RunConfig) -> tuple[Any, ...]:
    """What runs have in common that cost the same a step."""
    resolved = config.resolved()
    return tuple(getattr(resolved, name) for name in _KIND)


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _room(device: torch.device, peak: int, threads: int, cells: int) -> int:
    by_memory = int(0.8 * free_bytes(device) // max(peak, 1))
    most = MOST_JOBS if device.type == "cuda" else cores() // threads
    return max(1, min(by_memory, most, cells))


def _probe(config: RunConfig, device: str) -> tuple[KindCost, int]:
    """The cost of a kind of run, and the memory that it takes; called in a process that does nothing else."""
    set_machine(config.resolved())
    return _time(config, torch.device(device))


def _time(config: RunConfig, device: torch.device) -> tuple[KindCost, int]:
    """The cost of a run and its peak of memory; a long step is judged by a quarter of its batch."""
    # ENGM is the costliest optimizer; a program would be made within the few steps that are timed.
    run = Run(replace(config, optimizer="engm", step="eager"), Processes(device), dataset_of(config.resolved(), device))
    run.trainer.model.train()
    x, y = next(iter(run.batches.epoch(0)))
    before, part = _peak_bytes(device), max(2, len(x) // 4)
    run.trainer.step(x[:part], y[:part])
    run.trainer.step(x[:part], y[:part])
    held = _peak_bytes(device)
    seconds = run.trainer.finish_epoch().step_seconds[-1]
    scale = len(x) / part
    if seconds * scale < LONG or device.type == "cuda":
        start = time.perf_counter()
        run.trainer.step(x, y)
        run.trainer.step(x, y)
        run.trainer.finish_epoch()
        seconds, scale, held = (time.perf_counter() - start) / 2, 1.0, _peak_bytes(device)
    data = run.dataset
    cost = KindCost(seconds * scale, run.batches.steps, len(data.validation), len(data.test))
    return cost, int(before + (held - before) * scale)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
