"""Cells in processes of their own, several at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

from ..devices import choose_device
from ..failures import OtherProcessError
from ..runs.termination import STATUS, TerminatedError
from .cells import Cell
from .statistics import Record

if TYPE_CHECKING:
    import torch


def at_once(
    cells: Sequence[Cell], runs: Path, device: torch.device, jobs: int, on_cell: Callable[[Record, int], None]
) -> list[Record]:
    """Computes cells in ``jobs`` processes.

    If anything goes wrong, or the user interrupts, the processes are ended by SIGTERM, at which those that train save
    where they are; what they have saved stays. If this process is killed, they end themselves.

    Returns:
        The records in the order of the cells, whichever is finished first.

    Raises:
        OtherProcessError: a process was killed from outside, for want of memory, say.
        Exception: what a cell raised.
    """
    # Cells that are the same run go to one process: a second would find the folder in use.
    groups: dict[str, list[int]] = {}
    for index, cell in enumerate(cells):
        groups.setdefault(cell.folder_name, []).append(index)
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(groups)), mp_context=context, initializer=_follow_parent)
    records: dict[int, Record] = {}
    try:
        waiting = {pool.submit(_work, [cells[k] for k in group], runs, str(device)): group for group in groups.values()}
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                for index, record in zip(waiting.pop(future), future.result(), strict=True):
                    records[index] = record
                    on_cell(record, len(records))
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise OtherProcessError(
                "a process of these cells was killed, for want of memory perhaps: take fewer --jobs; the same command "
                "goes on where it was left"
            ) from error
        raise
    pool.shutdown()
    return [records[index] for index in range(len(cells))]


def _work(cells: Sequence[Cell], runs: Path, device: str) -> list[Record]:
    try:
        return [cell.run(runs, choose_device(device)) for cell in cells]
    except TerminatedError:  # what was trained is saved, and no other cell is to begin in this process
        os._exit(STATUS)


def _follow_parent() -> None:
    """Ctrl-C is the parent's to handle; without a parent there is nobody to work for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
