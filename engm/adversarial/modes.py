"""How an attack puts a network in the state that it needs, evaluation mode and nothing captured, and back again."""

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
    """Pauses every ``GradNormModule`` at or below ``model``, so that nothing is captured; plain modules run as ever."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, GradNormModule):
                stack.enter_context(module.paused())
        yield
