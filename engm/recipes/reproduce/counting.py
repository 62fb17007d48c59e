"""How many operations does a network take? They are counted from it, for plans of one that no table has."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..models import build_model


def counted(model: str, width: int | None, shape: tuple[int, int, int], classes: int, norm: str) -> tuple[int, int]:
    """Operations of a forward pass of one image, two a multiply-add, and the number of modules without children.

    Hooks on convolutions and linear layers multiply weights by positions in a forward pass, on torch's default device.

    Args:
        model: as :func:`engm.recipes.models.build_model` takes it, and so are the others.
        width: channels of the stem; ``None`` for the published number.
        shape: ``(C, H, W)`` of an image.
        classes: number of logits.
        norm: ``"batch"`` or ``"group"``.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: the network cannot be built.
    """
    net = build_model(model, classes=classes, in_channels=shape[0], image_size=shape[1], norm=norm, width=width).eval()
    operations = 0

    def count(layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal operations
        weight = layer.get_parameter("weight")
        operations += 2 * weight[0].numel() * output.numel()

    for module in net.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        net(torch.zeros(1, *shape))
    return operations, sum(not any(m.children()) for m in net.modules())
