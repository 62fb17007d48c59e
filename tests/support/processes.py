"""Several processes on this machine, each of which leaves what it found in a file.

They are forked by a server that has imported torch and run nothing, because importing torch anew takes every process
seconds.
"""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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


@contextmanager
def process_group(rank: int, port: int, processes: int) -> Iterator[None]:
    """Makes this process, on one thread, a rank of a group of all of them, which end together."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=60),  # a rank that waits for one that never comes is a failure, not a hang
    )
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()
