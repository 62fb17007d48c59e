"""Networks: sizes, shapes, names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engm.recipes.models import ResNet, resnet18, small_resnet


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_resnet18_has_the_papers_parameters_and_public_names() -> None:
    net = resnet18()
    assert count(net) == 11_173_962
    public = {"conv1.weight", "bn1.running_mean", "layer2.0.shortcut.0.weight", "layer4.1.bn2.bias", "linear.bias"}
    assert public <= set(net.state_dict())


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("size", [8, 13])
def test_any_image_size(norm: str, size: int) -> None:
    net = resnet18(8, classes=7, in_channels=2, norm=norm)  # type: ignore[arg-type]
    assert net(torch.rand(3, 2, size, size)).shape == (3, 7)


def test_group_norm_couples_nothing() -> None:
    assert not any(isinstance(module, nn.BatchNorm2d) for module in resnet18(6, norm="group").modules())


def test_small_resnet() -> None:
    net = small_resnet()
    assert count(net) == 77_754
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("settings", [{"norm": "layer"}, {"width": 0}, {"blocks": ()}, {"blocks": (1, 0)}])
def test_bad_settings(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        ResNet(**settings)  # type: ignore[arg-type]
