"""Seconds of every step, without making the device wait for its clock."""

from __future__ import annotations

import time
from types import TracebackType

import torch


class StepClock:
    """``with clock:`` around a step; on CUDA the times are events, read only when :meth:`take` asks for them."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start = 0.0
        self._seconds: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._cuda:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._start = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds.append(time.perf_counter() - self._start)

    def take(self) -> list[float]:
        """Seconds of every step since the last call."""
        if self._cuda:
            torch.cuda.synchronize()
            self._seconds = [start.elapsed_time(end) / 1e3 for start, end in self._events]
            self._events = []
        seconds, self._seconds = self._seconds, []
        return seconds
