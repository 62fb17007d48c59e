"""VGG-8 for small images (Simonyan and Zisserman, 2015)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .norms import NormName, norm_layer

_MULTIPLES = (1, 2, 4, 8, 8)


class VGG(nn.Module):
    """Five 3x3 convolutions, each with norm, ReLU and max pooling; global average pooling; a linear head.

    The paper names "VGG-8" without a definition. The field's VGG-8 is this: the eight layers are five convolutions of
    64-128-256-512-512 channels and VGG's three fully connected ones, and for small images one linear layer takes the
    place of those three. Modules are named as in the public code for it (``block0`` ... ``block4``, ``classifier``),
    but the convolutions have no bias: the norm behind them takes it away. PyTorch's default initialization.

    Args:
        width: channels of the first convolution; the others have 2, 4, 8 and 8 times as many.
        classes: number of logits.
        in_channels: channels of the input.
        norm: ``"batch"`` or ``"group"`` (8 groups, or the largest divisor of 8 that divides the channels).

    Raises:
        ValueError: an unknown norm, or a size below one.
    """

    def __init__(self, width: int = 64, *, classes: int = 10, in_channels: int = 3, norm: NormName = "batch") -> None:
        super().__init__()
        make_norm = norm_layer(norm)
        if min(width, classes, in_channels) < 1:
            raise ValueError(f"every size must be at least 1, got {width=}, {classes=}, {in_channels=}")
        channels = in_channels
        for index, multiple in enumerate(_MULTIPLES):
            convolution = nn.Conv2d(channels, multiple * width, 3, padding=1, bias=False)
            channels = multiple * width
            self.add_module(f"block{index}", nn.Sequential(convolution, make_norm(channels)))
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, in_channels, H, W]`` to logits ``[n, classes]``; any H and W: a side of one pixel stays."""
        out = x
        for index in range(len(_MULTIPLES)):
            out = F.relu(self.get_submodule(f"block{index}")(out))
            out = F.max_pool2d(out, (min(2, out.shape[2]), min(2, out.shape[3])))
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def vgg8(width: int = 64, *, classes: int = 10, in_channels: int = 3, norm: NormName = "batch") -> VGG:
    """VGG-8, as :class:`VGG` reads it: 3,917,386 parameters at width 64 with 10 classes."""
    return VGG(width, classes=classes, in_channels=in_channels, norm=norm)
