"""How long does a training step of every kind of run take on this machine? A few steps of each are timed."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import RunConfig
from ..data.memory import free_bytes
from ..machine import set_machine
from ..processes import Processes
from ..training.run import Run
from .cells import Cell, dataset_of
from .expense import Expense, KindCost, cores, kind_of, seconds_of

LONG = 2.0  # seconds; a longer step is not timed with a whole batch
MOST_JOBS = 8  # cells at once on one GPU


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
