"""No trace of Accelerate's global state, which Hugging Face's Trainer leaves too, in the tests that follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_accelerator_stays() -> Iterator[None]:
    """Forgets, when the context ends, what an ``Accelerator`` made in it has set for the whole process."""
    try:
        yield
    finally:
        from accelerate import state

        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
