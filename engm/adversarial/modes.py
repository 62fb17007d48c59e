"""The state that an attack runs a network in, and gives back: evaluation mode, nothing captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from ..module import GradNormModule


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts every module of ``model`` in evaluation mode and gives each its own mode back, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Captures nothing in here: pauses every ``GradNormModule`` at or below ``model``; plain modules pass through."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, GradNormModule):
                stack.enter_context(module.paused())
        yield
