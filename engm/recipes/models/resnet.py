"""Residual networks for small images (He et al., 2016), in the CIFAR form: a 3x3 stem, no max pooling.

Modules carry the names that public robust-training code uses (``conv1``, ``bn1``, ``layer1`` ... ``linear``), so
checkpoints of TRADES, AWP and others load as they are; ``bn1`` keeps its name when it is a group norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .norms import NormName, norm_layer


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``[n, in, H, W]`` to ``[n, out, H/stride, W/stride]``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = norm(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, norm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, stages of basic blocks (each but the first halves the map and doubles the channels), a linear head.

    Args:
        blocks: number of blocks of each stage.
        width: channels of the stem and of the first stage.
        classes: number of logits.
        in_channels: channels of the input.
        norm: ``"batch"`` or ``"group"`` (8 groups, or the largest divisor of 8 that divides the channels).

    Raises:
        ValueError: an unknown norm, or a size below one.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        *,
        classes: int = 10,
        in_channels: int = 3,
        norm: NormName = "batch",
    ) -> None:
        super().__init__()
        make_norm = norm_layer(norm)
        if not blocks or min(*blocks, width, classes, in_channels) < 1:
            raise ValueError(f"every size must be at least 1, got {blocks=}, {width=}, {classes=}, {in_channels=}")
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = make_norm(width)
        self.stages = len(blocks)
        channels = width
        for index, count in enumerate(blocks):
            out_channels = width * 2**index
            stage = nn.Sequential()
            for block in range(count):
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(BasicBlock(channels, out_channels, stride, make_norm))
                channels = out_channels
            self.add_module(f"layer{index + 1}", stage)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, in_channels, H, W]`` to logits ``[n, classes]``; any H and W."""
        out = F.relu(self.bn1(self.conv1(x)))
        for index in range(self.stages):
            out = self.get_submodule(f"layer{index + 1}")(out)
        out = F.adaptive_avg_pool2d(out, 1).flatten(1)
        logits: Tensor = self.linear(out)
        return logits


def resnet18(width: int = 64, *, classes: int = 10, in_channels: int = 3, norm: NormName = "batch") -> ResNet:
    """ResNet-18 as the paper trains it: 11,173,962 parameters at width 64 with 10 classes."""
    return ResNet((2, 2, 2, 2), width, classes=classes, in_channels=in_channels, norm=norm)


def small_resnet(width: int = 16, *, classes: int = 10, in_channels: int = 1, norm: NormName = "batch") -> ResNet:
    """Three blocks after the stem, for images of 8x8 pixels: 77,754 parameters at width 16."""
    return ResNet((1, 1, 1), width, classes=classes, in_channels=in_channels, norm=norm)
