"""Input normalization as a layer in front of a network, whose weights keep their names."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor, nn

NAME = "normalization"
"""The layer's name within the network: its buffers are ``normalization.mean`` and ``normalization.std``."""


class Normalization(nn.Module):
    """``(x - mean) / std`` of every channel, which a hook on the network that has this layer asks for.

    The layer itself changes nothing: a ``Sequential``, and any network that calls all of its children in turn, calls
    this one as well, behind the others.

    Args:
        mean: ``[C]``, in the units of the images.
        std: ``[C]``, positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        """What it is given."""
        return x

    def normalized(self, x: Tensor) -> Tensor:
        """Images ``[n, C, H, W]`` in [0, 1], normalized."""
        return (x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)


def check_normalization(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Looks whether a mean and a deviation can be those of pixels in [0, 1].

    Raises:
        ValueError: they are not one for all channels or one a channel, or out of range.
    """
    if not (len(mean) in (1, channels) and len(std) in (1, channels)):
        raise ValueError(
            f"mean and std must be one number, or one for each of the {channels} channels, "
            f"got {len(mean)} and {len(std)}"
        )
    if not all(0 <= value <= 1 for value in mean) or not all(isfinite(value) and 0 < value <= 1 for value in std):
        raise ValueError(
            f"mean and std must be of pixels in [0, 1], got {', '.join(f'{v:g}' for v in mean)} and "
            f"{', '.join(f'{v:g}' for v in std)}; divide what is of grey levels by 255"
        )


def with_normalization(net: nn.Module, mean: Tensor, std: Tensor) -> nn.Module:
    """The network itself, which normalizes its input from now on.

    The layer is called by a hook, and is no wrapper: weights keep the names that they have without it, so that they can
    be loaded and exported alike.

    Args:
        net: maps images ``[n, C, H, W]`` to logits.
        mean: ``[C]``.
        std: ``[C]``, positive.

    Raises:
        ValueError: the network has something of that name.
    """
    if hasattr(net, NAME):
        raise ValueError(f"the network has a part called {NAME!r} of its own")
    net.add_module(NAME, Normalization(mean, std))
    net.register_forward_pre_hook(_normalized)
    return net


def normalized_by(net: nn.Module, mean: Sequence[float], std: Sequence[float], channels: int) -> nn.Module:
    """The same by numbers, one for all channels or one a channel.

    Raises:
        ValueError: see :func:`check_normalization` and :func:`with_normalization`.
    """
    check_normalization(mean, std, channels)
    return with_normalization(net, *(torch.tensor(values).expand(channels).clone() for values in (mean, std)))


def _normalized(net: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (cast(Normalization, net.get_submodule(NAME)).normalized(inputs[0]), *inputs[1:])
