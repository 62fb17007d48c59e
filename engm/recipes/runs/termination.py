"""How a run ends when a queue or a user asks the process to, by SIGTERM: noted at once, obeyed at the next batch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..processes import Processes

STATUS = 128 + signal.SIGTERM  # what shells and queues report of a process that SIGTERM ended


class TerminatedError(RuntimeError):
    """A run ended because the process was asked to by SIGTERM; the message says what is kept."""


@dataclass
class Termination:
    """Whether SIGTERM has come.

    Attributes:
        asked: whether this process was asked to end.
    """

    asked: bool = False

    def asked_of(self, processes: Processes) -> bool:
        """Whether any process of the run was asked to end. Every process must call this at the same batch."""
        return self.asked if processes.world == 1 else bool(processes.total([self.asked])[0])


@contextmanager
def noted() -> Iterator[Termination]:
    """In here SIGTERM does not end the process: it is noted."""
    termination = Termination()

    def note(number: int, frame: object) -> None:
        termination.asked = True

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
