"""PGD and DeepFool against foolbox's, which share no code with ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from engm.adversarial import PGD, DeepFool

foolbox = pytest.importorskip("foolbox")


def problem(n: int, size: int, classes: int, seed: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """A small convolutional network, images, and the labels that it gives them (but for every fourth)."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * size**2, classes)
    )
    net = net.to(dtype).eval()
    x = torch.rand(n, 2, size, size, dtype=dtype)
    with torch.no_grad():
        y = net(x).argmax(dim=1)
    y[3::4] = (y[3::4] + 1) % classes
    return net, x, y


def wrapped(net: nn.Module) -> Any:
    return foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")


@given(
    norm=st.sampled_from(["linf", "l2"]),
    n=st.integers(1, 6),
    size=st.integers(1, 6),
    steps=st.integers(1, 7),
    eps=st.floats(0.01, 0.5),
    step=st.floats(0.1, 1.5),
    seed=st.integers(0, 999),
)
def test_pgd(norm: str, n: int, size: int, steps: int, eps: float, step: float, seed: int) -> None:
    net, x, y = problem(n, size, 3, seed, torch.float64)
    theirs = foolbox.attacks.LinfProjectedGradientDescentAttack if norm == "linf" else foolbox.attacks.L2PGD
    attack = theirs(abs_stepsize=step * eps, steps=steps, random_start=False)
    expected = attack.run(wrapped(net), x, foolbox.criteria.Misclassification(y), epsilon=eps)
    found = PGD(eps, step * eps, steps, norm=norm, random_start=False)(net, x, y).inputs  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@given(
    n=st.integers(1, 9),
    size=st.integers(1, 6),
    classes=st.integers(2, 12),
    candidates=st.integers(2, 12),
    steps=st.sampled_from([1, 2, 3, 50]),
    overshoot=st.sampled_from([0.0, 0.02, 0.5]),
    seed=st.integers(0, 999),
)
def test_deepfool(n: int, size: int, classes: int, candidates: int, steps: int, overshoot: float, seed: int) -> None:
    for dtype, atol in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        net, x, y = problem(n, size, classes, seed, dtype)
        theirs = foolbox.attacks.L2DeepFoolAttack(steps=steps, candidates=candidates, overshoot=overshoot)
        expected, _, broken = theirs(wrapped(net), x, y, epsilons=None)
        found = DeepFool(steps, candidates, overshoot)(net, x, y)
        torch.testing.assert_close(found.inputs, expected, rtol=0, atol=atol)
        torch.testing.assert_close(found.distances, (expected - x).flatten(1).norm(dim=1), rtol=0, atol=10 * atol)
        if dtype == torch.float64:
            assert torch.equal(found.broken, broken)
            with torch.no_grad():
                assert torch.equal(net(found.inputs).argmax(dim=1), net(expected).argmax(dim=1))
