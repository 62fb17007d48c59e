"""Networks: sizes, shapes, names, agreement with the publications' forward pass and with the engine's oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import engm
from engm.recipes.models import ResNet, build_model, preact_resnet18, resnet18, small_resnet, vgg8, wide_resnet

NARROW = {"small-resnet": 4, "resnet18": 4, "preact-resnet18": 4, "vgg8": 4, "wrn-10-2": 4}


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def narrow(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, width=NARROW[name], **options)


def per_example(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="none")


def batch(n: int, channels: int, size: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(n, channels, size, size, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(classes, (n,), generator=generator)


# -- sizes -----------------------------------------------------------------------------------------------------------


def counted(convolutions: list[tuple[int, int, int]], norms: list[int], head: tuple[int, int]) -> int:
    """Parameters of ``(in, out, kernel)`` convolutions without bias, norms of so many channels and a linear layer."""
    weights = sum(i * o * k * k for i, o, k in convolutions)
    return weights + 2 * sum(norms) + (head[0] + 1) * head[1]


def preact_layers(w: int, classes: int, channels: int) -> int:
    convolutions, norms, i = [(channels, w, 3)], [8 * w], w
    for o, changes in ((w, False), (2 * w, True), (4 * w, True), (8 * w, True)):
        convolutions += [(i, o, 3), (o, o, 3), (o, o, 3), (o, o, 3)] + [(i, o, 1)] * changes
        norms += [i, o, o, o]
        i = o
    return counted(convolutions, norms, (8 * w, classes))


def vgg_layers(w: int, classes: int, channels: int) -> int:
    sizes = [channels, w, 2 * w, 4 * w, 8 * w, 8 * w]
    return counted([(i, o, 3) for i, o in pairwise(sizes)], sizes[1:], (8 * w, classes))


def wide_layers(depth: int, widen: int, w: int, classes: int, channels: int) -> int:
    convolutions, norms, i = [(channels, w, 3)], [4 * w * widen], w
    for o in (w * widen, 2 * w * widen, 4 * w * widen):
        convolutions += [(i, o, 1)] * (i != o)
        for _ in range((depth - 4) // 6):
            convolutions += [(i, o, 3), (o, o, 3)]
            norms += [i, o]
            i = o
    return counted(convolutions, norms, (4 * w * widen, classes))


@pytest.mark.parametrize(
    ("name", "parameters", "derived"),
    [
        ("resnet18", 11_173_962, None),
        ("preact-resnet18", 11_172_170, preact_layers(64, 10, 3)),
        ("vgg8", 3_917_386, vgg_layers(64, 10, 3)),
        ("wrn-34-10", 46_160_474, wide_layers(34, 10, 16, 10, 3)),
        ("wrn-28-10", 36_479_194, wide_layers(28, 10, 16, 10, 3)),
    ],
)
def test_published_parameter_counts(name: str, parameters: int, derived: int | None) -> None:
    with torch.device("meta"):
        net = build_model(name, classes=10)
    assert count(net) == parameters
    assert derived in (None, parameters)


@settings(max_examples=15, deadline=None)
@given(w=st.integers(1, 9), classes=st.integers(1, 12), channels=st.integers(1, 4), k=st.integers(1, 3))
def test_parameter_counts_of_other_widths(w: int, classes: int, channels: int, k: int) -> None:
    options: dict[str, Any] = {"classes": classes, "in_channels": channels}
    with torch.device("meta"):
        assert count(preact_resnet18(w, **options)) == preact_layers(w, classes, channels)
        assert count(vgg8(w, **options)) == vgg_layers(w, classes, channels)
        wide = wide_resnet(6 * k + 4, k, w, **options)
    assert count(wide) == wide_layers(6 * k + 4, k, w, classes, channels)


def test_small_resnet() -> None:
    net = small_resnet()
    assert count(net) == 77_754
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 10)


# -- shapes ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(NARROW)),
    n=st.integers(1, 3),
    sides=st.tuples(st.integers(8, 23), st.integers(8, 23)),
    classes=st.integers(1, 7),
    channels=st.sampled_from([1, 3]),
    norm=st.sampled_from(["batch", "group"]),
)
def test_logits(name: str, n: int, sides: tuple[int, int], classes: int, channels: int, norm: str) -> None:
    net = narrow(name, classes=classes, in_channels=channels, norm=norm).eval()
    with torch.no_grad():
        logits = net(torch.rand(n, channels, *sides))
    assert logits.shape == (n, classes)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("name", NARROW)
def test_64_pixels(name: str) -> None:
    assert narrow(name, classes=5, image_size=64)(torch.rand(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize("name", NARROW)
def test_group_norm_couples_nothing(name: str) -> None:
    net = narrow(name, classes=3, norm="group").double()
    x = batch(3, 3, 8, 3)[0]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", NARROW)
def test_gradients_reach_every_parameter(name: str, norm: str) -> None:
    net = narrow(name, classes=4, norm=norm).double()
    x, y = batch(6, 3, 16, 4)
    F.cross_entropy(net(x), y).backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)]
    assert idle == []


# -- the forward passes of the publications --------------------------------------------------------------------------


class ByHand:
    """Layers in evaluation mode, straight from a state dict with the public names."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def norm_relu(self, x: Tensor, name: str) -> Tensor:
        s = {k: self.state[f"{name}.{k}"].view(-1, 1, 1) for k in ("weight", "bias", "running_mean", "running_var")}
        return ((x - s["running_mean"]) / (s["running_var"] + 1e-5).sqrt() * s["weight"] + s["bias"]).relu()

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)

    def head(self, x: Tensor, name: str) -> Tensor:
        return x.mean((2, 3)) @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def preact_block(self, x: Tensor, name: str, stride: int, shortcut: str) -> Tensor:
        h = self.norm_relu(x, f"{name}.bn1")
        inner = self.norm_relu(self.conv(h, f"{name}.conv1", stride), f"{name}.bn2")
        kept = self.conv(h, f"{name}.{shortcut}", stride) if f"{name}.{shortcut}.weight" in self.state else x
        return self.conv(inner, f"{name}.conv2") + kept


def preact_by_hand(net: ByHand, x: Tensor) -> Tensor:
    x = net.conv(x, "conv1")
    for stage in (1, 2, 3, 4):
        x = net.preact_block(x, f"layer{stage}.0", 1 if stage == 1 else 2, "shortcut.0")
        x = net.preact_block(x, f"layer{stage}.1", 1, "shortcut.0")
    return net.head(net.norm_relu(x, "bn"), "linear")


def wide_by_hand(net: ByHand, x: Tensor) -> Tensor:
    x = net.conv(x, "conv1")
    for stage in (1, 2, 3):
        x = net.preact_block(x, f"block{stage}.layer.0", 1 if stage == 1 else 2, "convShortcut")
        x = net.preact_block(x, f"block{stage}.layer.1", 1, "convShortcut")
    return net.head(net.norm_relu(x, "bn1"), "fc")


def vgg_by_hand(net: ByHand, x: Tensor) -> Tensor:
    for block in range(5):
        x = net.norm_relu(net.conv(x, f"block{block}.0"), f"block{block}.1")
        if x.shape[2] > 1:
            rows, columns = x.shape[2] // 2, x.shape[3] // 2
            x = x[:, :, : 2 * rows, : 2 * columns].unflatten(3, (columns, 2)).unflatten(2, (rows, 2)).amax((3, 5))
    return net.head(x, "classifier")


@pytest.mark.parametrize("size", [8, 13, 32])
@pytest.mark.parametrize(
    ("make", "by_hand"),
    [
        (lambda: preact_resnet18(3, classes=5), preact_by_hand),
        (lambda: wide_resnet(16, 3, 2, classes=5), wide_by_hand),
        (lambda: wide_resnet(16, 1, 3, classes=5, dropout=0.5), wide_by_hand),
        (lambda: vgg8(3, classes=5), vgg_by_hand),
    ],
    ids=["preact", "wide", "not widened", "vgg"],
)
def test_forward_pass_is_the_published_one(
    make: Callable[[], nn.Module], by_hand: Callable[[ByHand, Tensor], Tensor], size: int
) -> None:
    torch.manual_seed(0)
    net = make().double()
    for name, value in net.state_dict().items():
        if value.dim() == 1:
            value.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else value.normal_(0, 0.3)
    net.eval()
    x = batch(3, 3, size, 5)[0]
    torch.testing.assert_close(net(x), by_hand(ByHand(net.state_dict()), x), rtol=1e-11, atol=1e-11)


def test_resnet18_has_public_names() -> None:
    public = {"conv1.weight", "bn1.running_mean", "layer2.0.shortcut.0.weight", "layer4.1.bn2.bias", "linear.bias"}
    assert public <= set(resnet18(2).state_dict())


def test_wide_resnet_is_initialized_by_fan_out() -> None:
    torch.manual_seed(0)
    net = wide_resnet(10, 4)
    state = net.state_dict()
    for name, fan_out in {
        "block1.layer.0.conv1": 9 * 64,
        "block2.layer.0.convShortcut": 128,
        "block3.layer.0.conv2": 9 * 256,
    }.items():
        assert float(state[f"{name}.weight"].std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name
    assert bool((net.fc.bias == 0).all())


def test_dropout_drops_in_training_mode_only() -> None:
    torch.manual_seed(0)
    net = wide_resnet(10, 1, 4, norm="group", dropout=0.5).double()
    x = batch(2, 3, 8, 5)[0]
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


# -- the engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", NARROW)
def test_engine_agrees_with_its_oracle(name: str, norm: str) -> None:
    net = narrow(name, classes=4, norm=norm).double().train(norm == "group")
    report = engm.verify(engm.GradNormModule(net), per_example, batch(3, 3, 9, 4), raise_on_error=True)
    assert not report.couples
    assert "not reached" not in {layer.rule for layer in report.layers}


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"norm": "layer"}, {"width": 0}, {"blocks": ()}, {"blocks": (1, 0)}])
def test_bad_settings_of_resnet(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        ResNet(**options)


@pytest.mark.parametrize("make", [preact_resnet18, vgg8, wide_resnet])
@pytest.mark.parametrize("options", [{"norm": "layer"}, {"width": 0}, {"classes": 0}, {"in_channels": 0}])
def test_bad_settings(make: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        make(**options)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_bad_dropout(dropout: float) -> None:
    with pytest.raises(ValueError, match="dropout must be"):
        wide_resnet(10, 1, dropout=dropout)
