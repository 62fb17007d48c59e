"""Which arguments of users are refused, and with what error: names, losses, alpha and other positive numbers."""

from __future__ import annotations

from cmath import isfinite
from collections.abc import Iterable
from difflib import get_close_matches
from math import nan
from typing import Any

import torch
from torch import Tensor

from .torch_internals import is_recorded


def check_name(name: str, known: Iterable[str], *, what: str) -> None:
    """Refuses a name that is not known.

    Args:
        name: the name as typed.
        known: the known names.
        what: what the name should be the name of, for the message.

    Raises:
        ValueError: the name is not known; the message says which are nearest, and all of them if they are few.
    """
    names = list(known)
    if name in names:
        return
    near = get_close_matches(str(name).lower(), names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    everything = f" (known: {', '.join(names)})" if len(names) <= 40 else ""
    raise ValueError(f"unknown {what}: {name!r}{hint}{everything}")


class NonFiniteError(ValueError):
    """A loss or a gradient is infinite or NaN; nothing was changed."""


class RefusedError(RuntimeError):
    """Norms cannot be told of this network, or used in this way; the message names the place and says what to do."""


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
        finite = losses.device.type == "cpu" and not is_recorded()
    if finite:
        check_finite(losses)


def check_finite(losses: Tensor) -> None:
    """Refuses losses that are not finite; the host waits for the device.

    Raises:
        NonFiniteError: names them.
    """
    if isfinite(sum(losses.tolist())):  # of a few numbers by the host, which is quicker; a sum may have overflown
        return
    if not bool(torch.isfinite(losses.detach()).all()):
        bad = (~torch.isfinite(losses.detach())).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"losses of examples {bad[:8]}{' and more' if len(bad) > 8 else ''} are not finite; nothing was changed. "
            "Skip the batch, lower the learning rate, or pass check=False to get NaN weights for them instead."
        )


def check_alpha(alpha: Any) -> float:
    """``alpha`` as a positive float (``inf`` is allowed and clips nothing).

    Raises:
        ValueError: ``alpha`` is not a positive number.
    """
    try:
        value = float(alpha)
    except (TypeError, ValueError):
        raise ValueError(f"alpha must be a positive number, got {alpha!r}.") from None
    if not value > 0:
        raise ValueError(f"alpha must be positive, got {alpha!r}; engm.alpha_for(net) suggests one.")
    return value


def check_positive(name: str, value: float) -> float:
    """``value`` as a float.

    Raises:
        ValueError: ``value`` is not a positive finite number; the message names the argument.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = nan
    if not (isfinite(number) and number > 0):
        raise ValueError(f"{name} must be a positive and finite number, got {value!r}.")
    return number
