"""Several processes on this machine, each of which leaves what it found in a file."""

import socket

import torch
import torch.multiprocessing as mp


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def found_by(work, processes, folder):
    """What ``work(rank, port, folder)`` saved as ``folder / f"{rank}.pt"``, for every rank."""
    mp.spawn(work, (free_port(), folder), nprocs=processes)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]
