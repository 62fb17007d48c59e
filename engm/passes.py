"""Backward passes of ours: those in which captured calls hand their gradients over, and batch norms are frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from .graph import Trace
from .rules.normalization import with_constant_statistics
from .rules.operators import batch_norm_gain


@contextmanager
def collecting(traced: Trace, session: Any) -> Iterator[None]:
    """Hand the gradients of all captured calls of a graph to ``session.receive`` while a backward pass runs.

    Raises:
        RuntimeError: somebody collects from it already.
    """
    captures = traced.captures()
    if any(capture.session is not None for capture in captures):
        raise RuntimeError("engm: this graph is being measured already (a measurement inside a backward hook?).")
    for call in traced.calls:
        call.put_hook_last()
    try:
        for capture in captures:
            capture.session = session
        yield
    finally:
        for capture in captures:
            capture.session = None


@contextmanager
def frozen_statistics(traced: Trace, couplings: Iterable[int]) -> Iterator[None]:
    """Backward passes take the statistics of all batch norms of a graph for constants.

    Args:
        traced: the graph.
        couplings: positions of those outside of captured calls.
    """
    handles = []
    try:
        for capture in traced.captures():
            capture.frozen = True
        for position in couplings:
            node = traced.order[position]
            handles.append(node.register_hook(_with_constant_statistics(node)))
        yield
    finally:
        for capture in traced.captures():
            capture.frozen = False
        for handle in handles:
            handle.remove()


def _with_constant_statistics(node: Any) -> Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[Any, ...] | None]:
    """Node hook of a batch norm outside of calls."""

    def after(grad_inputs: tuple[Any, ...], grad_outputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return with_constant_statistics(grad_inputs, 0, grad_outputs[0], batch_norm_gain(node))

    return after
