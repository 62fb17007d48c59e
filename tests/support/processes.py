"""Several processes on this machine, each of which leaves what it found in a file.

They are forked by a server that has imported torch and run nothing, because importing torch anew takes every process
seconds.
"""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "torch.nn.parallel", "pytest", "engm"])


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started(work: Callable[..., None], arguments: tuple[Any, ...], processes: int) -> mp.ProcessContext:
    """Processes that run ``work(rank, *arguments)``; whoever joins them gets the error of the first that fails."""
    return mp.start_processes(work, arguments, nprocs=processes, join=False, start_method="forkserver")


def joined(work: Callable[..., None], arguments: tuple[Any, ...], processes: int) -> None:
    """Runs such processes to their end."""
    running = started(work, arguments, processes)
    while not running.join():
        pass


def found_by(work: Callable[[int, int, Path], None], processes: int, folder: Path) -> list[Any]:
    """What ``work(rank, port, folder)`` saved as ``folder / f"{rank}.pt"``, for every rank."""
    joined(work, (free_port(), folder), processes)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]
