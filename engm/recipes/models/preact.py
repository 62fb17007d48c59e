"""Pre-activation residual networks for small images (He et al., *Identity Mappings*, 2016), in the CIFAR form.

The form of robust_overfitting (Rice et al., 2020) and of the fast adversarial training before it: a last norm (``bn``)
and ReLU come before the pooling, as in the publication; the widespread pytorch-cifar version leaves both out. Modules
carry the names of that code, whose checkpoints put DataParallel's ``module.`` before them and expect standardized
images. PyTorch's default initialization, as there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .norms import NormName, norm_layer


class PreActBlock(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice, and a shortcut: ``[n, in, H, W]`` to ``[n, out, H/stride, W/stride]``.

    A shortcut that changes the shape starts behind the first ReLU; one that does not, at the input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.bn1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return out + shortcut


class PreActResNet(nn.Module):
    """A 3x3 stem, four stages of two blocks (1, 2, 4, 8 times ``width`` channels), norm and ReLU, a linear head.

    Args:
        width: channels of the stem and of the first stage.
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
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.layer1 = _stage(width, width, 1, make_norm)
        self.layer2 = _stage(width, 2 * width, 2, make_norm)
        self.layer3 = _stage(2 * width, 4 * width, 2, make_norm)
        self.layer4 = _stage(4 * width, 8 * width, 2, make_norm)
        self.bn = make_norm(8 * width)
        self.linear = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, in_channels, H, W]`` to logits ``[n, classes]``; any H and W."""
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        out = F.adaptive_avg_pool2d(F.relu(self.bn(out)), 1).flatten(1)
        logits: Tensor = self.linear(out)
        return logits


def _stage(in_channels: int, out_channels: int, stride: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        PreActBlock(in_channels, out_channels, stride, norm), PreActBlock(out_channels, out_channels, 1, norm)
    )


def preact_resnet18(
    width: int = 64, *, classes: int = 10, in_channels: int = 3, norm: NormName = "batch"
) -> PreActResNet:
    """PreAct-ResNet-18: 11,172,170 parameters at width 64 with 10 classes."""
    return PreActResNet(width, classes=classes, in_channels=in_channels, norm=norm)
