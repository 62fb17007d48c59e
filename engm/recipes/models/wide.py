"""Wide residual networks (Zagoruyko and Komodakis, 2016), as the public code of TRADES, MART and AWP has them.

Modules carry the names of that code (``conv1``, ``block1.layer.0`` ... ``bn1``, ``fc``). Its networks also hold a
``sub_block1`` that no forward pass uses, 2.10 M parameters at 34-10: hence the paper's 48.2 M, of which 46.16 M work.
It is left out here, and passed over in files that have it (``engm evaluate FILE``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .norms import NormName, norm_layer


class WideBlock(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice, and a shortcut: ``[n, in, H, W]`` to ``[n, out, H/stride, W/stride]``.

    A shortcut that changes the channels starts behind the first ReLU; one that does not, at the input.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, norm: Callable[[int], nn.Module], dropout: float
    ) -> None:
        super().__init__()
        self.bn1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.dropout = dropout
        self.convShortcut: nn.Module | None = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        out = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        out = F.relu(self.bn2(self.conv1(out)))
        if self.dropout > 0:
            out = F.dropout(out, self.dropout, self.training)
        return shortcut + self.conv2(out)


class WideResNet(nn.Module):
    """A 3x3 stem, three stages of ``(depth - 4) / 6`` blocks, norm and ReLU, a linear head.

    Initialized as the public code is: convolutions normal with variance 2 / (9 · output channels) (He et al., 2015,
    by fan out; 1x1 shortcuts without the 9), norms 1 and 0, the head's bias 0 and its weight PyTorch's default.

    Args:
        depth: number of layers, ``6 k + 4``.
        widen: the stages have ``widen``, ``2 widen`` and ``4 widen`` times the stem's channels.
        width: channels of the stem.
        classes: number of logits.
        in_channels: channels of the input.
        norm: ``"batch"`` or ``"group"`` (8 groups, or the largest divisor of 8 that divides the channels).
        dropout: probability of dropping a value between the two convolutions of a block.

    Raises:
        ValueError: an unknown norm, a depth that is not ``6 k + 4`` from 10 on, a size below one or a dropout outside
            ``[0, 1)``.

    Attributes:
        passed_over: names of modules that public weights may have besides, which no forward pass uses.
    """

    passed_over = ("sub_block1",)

    def __init__(
        self,
        depth: int = 34,
        widen: int = 10,
        width: int = 16,
        *,
        classes: int = 10,
        in_channels: int = 3,
        norm: NormName = "batch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        make_norm = norm_layer(norm)
        if depth < 10 or (depth - 4) % 6 != 0:
            raise ValueError(f"the depth of a wide ResNet must be 6k + 4 (10, 16, 22, 28, 34, ...), got {depth}")
        if min(widen, width, classes, in_channels) < 1:
            raise ValueError(f"every size must be at least 1, got {widen=}, {width=}, {classes=}, {in_channels=}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        channels = width
        for stage in range(3):
            blocks = nn.Sequential()
            out_channels = width * widen * 2**stage
            for block in range((depth - 4) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(WideBlock(channels, out_channels, stride, make_norm, dropout))
                channels = out_channels
            self.add_module(f"block{stage + 1}", nn.Sequential(OrderedDict(layer=blocks)))
        self.bn1 = make_norm(channels)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, in_channels, H, W]`` to logits ``[n, classes]``; any H and W."""
        out = self.conv1(x)
        for stage in range(3):
            out = self.get_submodule(f"block{stage + 1}")(out)
        out = F.adaptive_avg_pool2d(F.relu(self.bn1(out)), 1).flatten(1)
        logits: Tensor = self.fc(out)
        return logits


def wide_resnet(
    depth: int = 34,
    widen: int = 10,
    width: int = 16,
    *,
    classes: int = 10,
    in_channels: int = 3,
    norm: NormName = "batch",
    dropout: float = 0.0,
) -> WideResNet:
    """WRN-``depth``-``widen``: 46,160,474 parameters at 34-10 with 10 classes, all of them used."""
    return WideResNet(depth, widen, width, classes=classes, in_channels=in_channels, norm=norm, dropout=dropout)
