"""Networks by name: ours, torchvision's and timm's, and group norms in the place of their batch norms."""

from __future__ import annotations

import socket
import sys
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import engm
from engm.recipes.models import MODELS, ResNet, batch_to_group_norm, build_model


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def per_example(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="none")


# -- swapping norms --------------------------------------------------------------------------------------------------


def test_swapped_norms_keep_what_they_had() -> None:
    shared = nn.BatchNorm2d(12, eps=1e-3)
    nn.init.normal_(shared.weight)
    net = nn.Sequential(shared, nn.Sequential(shared, nn.BatchNorm2d(5, affine=False)), nn.Linear(2, 2)).eval()
    scale, shift = shared.weight, shared.bias
    assert batch_to_group_norm(net) is net
    first, inner = net[0], net[1]
    assert isinstance(first, nn.GroupNorm)
    assert first.weight is scale
    assert first.bias is shift
    assert (first.num_groups, first.eps, first.training) == (4, 1e-3, False)
    assert inner[0] is first
    assert inner[1].num_groups == 1
    assert list(inner[1].parameters()) == []
    x = torch.rand(2, 12, 3, 3)
    groups = x.view(2, 4, -1)
    normed = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(first(x), normed.view_as(x) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))


def test_a_network_that_is_a_norm() -> None:
    assert isinstance(batch_to_group_norm(nn.BatchNorm2d(3)), nn.GroupNorm)


def test_joined_activation_is_kept() -> None:
    net = nn.Sequential(BatchNormAct2d(8, act_layer=nn.SiLU))
    x = torch.randn(2, 8, 3, 3)
    batch_to_group_norm(net)
    torch.testing.assert_close(net(x), F.silu(F.group_norm(x, 8)))


def test_other_batch_norms_are_refused_and_nothing_is_changed() -> None:
    class Special(nn.BatchNorm2d):
        pass

    net = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm1d(4), Special(4))
    before = list(net)
    with pytest.raises(ValueError, match="BatchNorm1d, Special"):
        batch_to_group_norm(net)
    assert all(a is b for a, b in zip(net, before, strict=True))


# -- the registry ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_names_of_ours_need_no_other_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    options: dict[str, Any] = {"classes": 2, "in_channels": 1, "width": 2}
    with torch.device("meta"):
        expected = MODELS[name](**options)
        for spelling in (name, name.upper(), name.replace("-", "_")):
            net = build_model(spelling, **options)
            assert type(net) is type(expected)
            assert count(net) == count(expected)


@pytest.mark.parametrize(
    "name", ["torchvision:shufflenet_v2_x0_5", "ShuffleNet-V2-x0-5", "timm:test_resnet", "test_vit"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_names_of_others_build_without_network_access(
    name: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    net = build_model(name, classes=6, in_channels=channels, image_size=32)
    assert net.training
    assert net(torch.rand(2, channels, 32, 32)).shape == (2, 6)


def test_sources() -> None:
    ours, theirs, timms = (
        build_model(name, classes=2) for name in ("resnet18", "torchvision:resnet18", "TIMM:resnet18")
    )
    assert isinstance(ours, ResNet)
    assert type(theirs).__module__.startswith("torchvision")
    assert type(timms).__module__.startswith("timm")


@pytest.mark.parametrize("name", ["torchvision:vit_b_16", "timm:vit_tiny_patch16_224"])
def test_transformers_get_the_size_of_the_images(name: str) -> None:
    with torch.device("meta"):
        assert build_model(name, classes=3, image_size=48)(torch.empty(2, 3, 48, 48)).shape == (2, 3)


def test_training_mode_gives_logits_alone() -> None:
    with torch.device("meta"):
        assert build_model("googlenet", classes=3)(torch.empty(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("preact-resnet81", {}, "preact-resnet18"),
        ("ResNet_51", {}, "resnet50"),
        ("torchvision:shufflenet_v3", {}, "shufflenet-v2"),
        ("timm:vit_tny_patch16_224", {}, "vit-tiny-patch16-224"),
        ("torchvison:resnet50", {}, "did you mean torchvision"),
        ("timm:resnet18.a1_in1k", {}, "unknown network of timm"),
        ("wrn-35-10", {}, "6k"),
        ("wrn-4-10", {}, "6k"),
        ("wrn-10-0", {}, "at least 1"),
        ("vgg8", {"width": 0}, "at least 1"),
        ("vgg8", {"classes": 0}, "at least 1"),
        ("vgg8", {"norm": "layer"}, "norm must be"),
        ("resnet50", {"norm": "layer"}, "norm must be"),
        ("resnet50", {"width": 8}, "leave it out"),
        ("vit_b_16", {"image_size": 33}, "33x33"),
        ("timm:repvit_m1", {"norm": "group"}, "BatchNorm1d"),
    ],
)
def test_errors_of_names_and_settings(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match), torch.device("meta"):
        build_model(name, **{"classes": 3, **options})


def test_input_channels_of_a_network_without_one_first_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    two = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1))
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: two)
    with pytest.raises(ValueError, match="2 of its convolutions"):
        build_model("torchvision:resnet18", classes=2, in_channels=1)


def test_networks_without_a_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = nn.Conv2d(3, 2, 1)
    encoder.num_classes = 0  # type: ignore[assignment]  # as timm's encoders have it
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: encoder)
    with pytest.raises(ValueError, match="no classifier"):
        build_model("timm:resnet18", classes=2)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with torch.device("meta"):
        build_model("resnet34", classes=2)
    with pytest.raises(ModuleNotFoundError, match="pip install timm"):
        build_model("timm:test_resnet", classes=2)
    with pytest.raises(ModuleNotFoundError, match=r"did you mean .*resnet50.*pip install timm"):
        build_model("resnet51", classes=2)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'engm\[recipes\]'"):
        build_model("resnet34", classes=2)


# -- the engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torchvision:shufflenet_v2_x0_5", "timm:test_resnet"])
def test_engine_agrees_on_swapped_norms_behind_relus_in_place(name: str) -> None:
    torch.manual_seed(0)
    net = build_model(name, classes=4, norm="group").double()
    assert any(isinstance(module, nn.ReLU) and module.inplace for module in net.modules())
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    report = engm.verify(engm.GradNormModule(net), per_example, (x, torch.tensor([3, 1])), raise_on_error=True)
    assert not report.couples
