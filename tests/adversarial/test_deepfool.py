"""DeepFool where the answer is known, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import engm
from engm.adversarial import DeepFool


def linear(classes: int, features: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(features, classes)).double()


@given(n=st.integers(1, 7), classes=st.integers(2, 6), features=st.integers(2, 20), seed=st.integers(0, 999))
def test_a_linear_network_takes_one_step_to_its_nearest_boundary(
    n: int, classes: int, features: int, seed: int
) -> None:
    net = linear(classes, features, seed)
    x = 0.4 + 0.2 * torch.rand(n, features, dtype=torch.float64)
    with torch.no_grad():
        net[1].weight.mul_(20)  # boundaries so near that the box is far
        net[1].bias.sub_(net[1].weight.sum(dim=1) / 2)
        logits = net(x)
    found = DeepFool(steps=3, overshoot=0.5)(net, x)
    assume(bool(found.inputs.min() > 0 and found.inputs.max() < 1))
    assert found.broken.all()
    torch.testing.assert_close(found.distances, (found.inputs - x).norm(dim=1))
    for i in range(n):
        own = int(logits[i].argmax())
        nearest = min(
            (logits[i, own] - logits[i, k]).item() / (net[1].weight[own] - net[1].weight[k]).norm().item()
            for k in range(classes)
            if k != own
        )
        assert found.distances[i].item() == pytest.approx(1.5 * (nearest + 1e-4), rel=1e-5)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(27, 4)
    )


@pytest.fixture
def x() -> Tensor:
    return torch.rand(9, 1, 5, 5, generator=torch.Generator().manual_seed(1))


def test_misclassified_examples_stay(net: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        own = net.eval()(x).argmax(dim=1)
    y = own.clone()
    y[::2] = (y[::2] + 1) % 4
    found = DeepFool()(net, x, y)
    assert torch.equal(found.inputs[::2], x[::2])
    assert not found.distances[::2].any()
    assert found.broken.all()
    assert (found.distances[1::2] > 0).all()
    without = DeepFool()(net, x)
    torch.testing.assert_close(without.inputs[1::2], found.inputs[1::2])
    assert (without.distances > 0).all()
    assert found.inputs.min() >= 0
    assert found.inputs.max() <= 1


def test_too_few_steps_leave_examples_standing(net: nn.Module, x: Tensor) -> None:
    """An example that the first step broke is where the whole run leaves it."""
    one, all_of_them = DeepFool(steps=1, overshoot=0.0)(net, x), DeepFool(overshoot=0.0)(net, x)
    assert torch.equal(one.inputs[one.broken], all_of_them.inputs[one.broken])
    assert 0 < one.broken.sum() < len(x)
    assert all_of_them.broken.all()


def test_modes_and_gradients_are_left_as_they_were(net: nn.Module, x: Tensor) -> None:
    model = engm.GradNormModule(net.train())
    net[1].eval()
    before = [module.training for module in net.modules()]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        found = DeepFool()(model, x)
    assert torch.equal(found.inputs, DeepFool()(net, x).inputs)
    assert not found.inputs.requires_grad
    assert [module.training for module in net.modules()] == before
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert engm.measure(model, model(x).sum(dim=1)).norms.shape == (9,)  # no longer paused


def test_a_constant_network_is_not_fooled(x: Tensor) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(25, 3))
    nn.init.zeros_(net[1].weight)
    found = DeepFool()(net, x)
    assert torch.equal(found.inputs, x)
    assert not found.broken.any()


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"candidates": 1}, {"overshoot": -0.1}, {"overshoot": float("nan")}]
)
def test_bad_settings(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="DeepFool needs"):
        DeepFool(**settings)  # type: ignore[arg-type]


def test_bad_arguments(net: nn.Module, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        DeepFool()(net, x - 1)
    with pytest.raises(ValueError, match="one label per example"):
        DeepFool()(net, x, torch.zeros(3).long())
    with pytest.raises(ValueError, match="at least two classes"):
        DeepFool()(nn.Sequential(nn.Flatten(), nn.Linear(25, 1)), x)
