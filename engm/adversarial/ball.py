"""Where perturbed examples may be: lengths, directions, the projection onto a ball, and what inputs must look like."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..torch_internals import is_recorded

Norm = Literal["linf", "l2"]


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """``[n]`` to ``[n, 1, ...]``, to broadcast against ``like``."""
    return values.view(-1, *[1] * (like.dim() - 1))


def lengths(x: Tensor, norm: Norm = "l2") -> Tensor:
    """The length ``[n]`` of every example ``[n, ...]`` over all its entries."""
    return torch.linalg.vector_norm(x.flatten(1), ord=2 if norm == "l2" else float("inf"), dim=1)


def unit(x: Tensor) -> Tensor:
    """Every example scaled to Euclidean length 1, however small or large its numbers; a zero example stays zero."""
    x = x / per_example(_nonzero(lengths(x, "linf")), x)  # whose squares might be 0 or infinite
    return x / per_example(_nonzero(lengths(x)), x)


def project(x_adv: Tensor, origin: Tensor, eps: float, norm: Norm) -> Tensor:
    """``x_adv`` projected onto the ball around ``origin``, then onto the box [0, 1].

    The second projection cannot lead out of the ball, because ``origin`` lies in the box.
    """
    if norm == "linf":
        x_adv = torch.clamp(x_adv, origin - eps, origin + eps)
    else:
        delta = x_adv - origin
        x_adv = origin + delta * per_example((eps / _nonzero(lengths(delta))).clamp(max=1.0), delta)
    return x_adv.clamp(0.0, 1.0)


def check_examples(x: Tensor, y: Tensor | None = None) -> None:
    """Refuses inputs that cannot be attacked.

    Args:
        x: what should be floating point inputs ``[n, ...]`` in [0, 1].
        y: what should be labels ``[n]``.

    Raises:
        ValueError: no examples, integers, values outside [0, 1] (looked at on the CPU only, where looking is cheap),
            or labels ``y`` that are not one per example.
    """
    if x.dim() < 2 or x.shape[0] == 0 or not x.is_floating_point():
        raise ValueError(f"expected floating-point inputs [n, ...] with n >= 1, got {x.dtype} {list(x.shape)}")
    if y is not None and y.shape != x.shape[:1]:
        raise ValueError(f"expected one label per example, [{x.shape[0]}], got {list(y.shape)}")
    if x.device.type == "cpu" and not is_recorded():
        low, high = (value.item() for value in torch.aminmax(x))
        if low < 0 or high > 1:
            raise ValueError(
                f"expected inputs in [0, 1], got values in [{low:.4g}, {high:.4g}]; "
                "put the normalisation inside the network, so that eps is in pixel units"
            )


def _nonzero(length: Tensor) -> Tensor:
    """Lengths that can be divided by."""
    return length.clamp_min(torch.finfo(length.dtype).tiny)
