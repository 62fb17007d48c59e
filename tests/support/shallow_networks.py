"""Networks of two convolutions, for tests of what a run does around its network.

A run finds one by its address, ``shallow_networks:batch`` or ``shallow_networks:group``. To record its steps takes a
quarter of the time that those of the smallest ResNet take.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Shallow(nn.Module):
    """A convolution, another one beside a shortcut, each with a norm, and a linear head."""

    def __init__(self, norm: type[nn.Module], sizes: tuple[int, ...], num_classes: int, in_channels: int) -> None:
        super().__init__()
        channels = sizes[-1]
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = norm(*sizes)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.last_norm = norm(*sizes)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.last_norm(self.conv(x)) + x)
        return self.linear(x.mean((2, 3)))


def batch(num_classes: int, in_channels: int, width: int = 4) -> nn.Module:
    """With batch norm."""
    return Shallow(nn.BatchNorm2d, (width,), num_classes, in_channels)


def group(num_classes: int, in_channels: int, width: int = 4) -> nn.Module:
    """With group norm, in one group."""
    return Shallow(nn.GroupNorm, (1, width), num_classes, in_channels)
