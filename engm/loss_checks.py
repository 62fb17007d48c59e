"""Which losses cannot have per-example gradients, and with what error they are refused."""

from __future__ import annotations

import torch
from torch import Tensor

from ._C import all_finite
from .checks import NonFiniteError
from .torch_internals import is_recorded


def check_losses(losses: Tensor, *, finite: bool | None = False) -> None:
    """Refuses losses that cannot have per-example gradients.

    Args:
        losses: what should be ``[n]`` losses with a graph.
        finite: whether to look for losses that are not finite; None: on the CPU only, because elsewhere looking
            synchronises.

    Raises:
        TypeError: ``losses`` is not a tensor.
        ValueError: ``losses`` is not ``[n]`` with ``n >= 1``, or has no graph.
        NonFiniteError: with ``finite``, a loss is not finite.
    """
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses must be a tensor [n] with one loss an example, got {type(losses).__name__}.")
    if losses.dim() != 1:
        raise ValueError(
            f"losses must have shape [n], one loss an example, got {tuple(losses.shape)}: pass reduction='none' to the "
            "loss function and reduce everything but the first dimension."
        )
    if losses.shape[0] == 0:
        raise ValueError("losses has no example in it (shape [0]): skip empty batches.")
    if losses.grad_fn is None:
        raise ValueError(
            "losses has no graph to backpropagate (computed under torch.no_grad(), detached, or from a model none of "
            "whose parameters require grad)."
        )
    if finite is None:
        finite = losses.is_cpu and not is_recorded()
    if finite:
        check_finite(losses)


def check_finite(losses: Tensor) -> None:
    """Refuses losses that are not finite; the host waits for the device.

    Raises:
        NonFiniteError: names them.
    """
    if not all_finite(losses):
        bad = (~torch.isfinite(losses.detach())).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"losses of examples {bad[:8]}{' and more' if len(bad) > 8 else ''} are not finite; nothing was changed. "
            "Skip the batch, lower the learning rate, or pass check=False to get NaN weights for them instead."
        )
