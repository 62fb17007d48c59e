"""Input normalisation as the first part of a network, so that what is outside works on pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor, nn


def check_normalisation(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
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


class Normalised(nn.Module):
    """``net((x - mean) / std)``.

    Args:
        net: takes normalised images.
        mean: one number, or one a channel, in units of pixels in [0, 1].
        std: likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, C, H, W]`` in [0, 1] to what ``net`` returns."""
        return self.net((x - self.mean) / self.std)
