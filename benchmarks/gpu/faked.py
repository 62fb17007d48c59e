"""CUDA's clock and allocator, faked on the CPU, so that a rehearsal takes the steps that are taken on a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch


class FakedEvent:
    """A CUDA event that reads the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._seconds = 0.0

    def record(self) -> None:
        """Reads the clock."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: FakedEvent) -> float:
        """Milliseconds from here to ``end``."""
        return 1e3 * (end._seconds - self._seconds)


FAKES = {
    "Event": FakedEvent,
    "synchronize": lambda: None,
    "empty_cache": lambda: None,
    "reset_peak_memory_stats": lambda: None,
    "memory_allocated": lambda: 1_000_000,
    "max_memory_allocated": lambda: 3_000_000,
}


@contextmanager
def faked_cuda() -> Iterator[None]:
    """``torch.cuda`` with a faked clock and allocator; there are no streams, graphs or kernels."""
    with ExitStack() as stack:
        for name, fake in FAKES.items():
            stack.enter_context(patch.object(torch.cuda, name, fake))
        yield
