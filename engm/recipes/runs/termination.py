"""How a run ends before its time, by SIGTERM or --time-limit: noted at once, obeyed at the next batch."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..processes import Processes

STATUS = 128 + signal.SIGTERM  # what shells and queues report of a process that SIGTERM ended


class TerminatedError(RuntimeError):
    """A run ended because the process was asked to, by SIGTERM or a time limit; the message says what is kept."""


@dataclass
class Deadline:
    """When a run has to have ended.

    Attributes:
        limit: the time that there is, as the user wrote it.
        end: the moment, as ``time.monotonic`` counts.
    """

    limit: str
    end: float
    _last: float = field(default_factory=lambda: time.monotonic())
    _longest: float = 0.0

    def near(self) -> bool:
        """Whether the longest time that has passed between two calls would lead beyond the end from now."""
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now
        return now + self._longest >= self.end


@dataclass
class Termination:
    """Whether SIGTERM has come, or the time that there is comes to its end.

    Attributes:
        deadline: when that is; ``None`` where there is time enough.
        signalled: whether SIGTERM has come to this process.
        by: what asked for the end, in words.
    """

    deadline: Deadline | None = None
    signalled: bool = False
    by: str = "SIGTERM"

    @property
    def asked(self) -> bool:
        """Whether this process was asked to end."""
        if not self.signalled and self.deadline is not None and self.deadline.near():
            self.by = f"--time-limit {self.deadline.limit}"
            return True
        return self.signalled

    def asked_of(self, processes: Processes) -> bool:
        """Whether any process of the run was asked to end. Every process must call this at the same batch."""
        asked = self.asked
        return asked if processes.world == 1 else bool(processes.total([asked])[0])


@contextmanager
def noted(deadline: Deadline | None = None) -> Iterator[Termination]:
    """In here SIGTERM does not end the process: it is noted."""
    termination = Termination(deadline)

    def note(number: int, frame: object) -> None:
        termination.signalled = True

    with _handled(note):
        yield termination


@contextmanager
def raised() -> Iterator[None]:
    """In here SIGTERM raises :class:`TerminatedError`, so that what is open is closed and the user is told."""

    def end(number: int, frame: object) -> None:
        raise TerminatedError("ended by SIGTERM")

    with _handled(end):
        yield


@contextmanager
def _handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Has SIGTERM handled; not in a thread, because Python leaves signals to the main one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
