"""The authors' training steps, as they are restated for timing, leave what ours leave."""

from __future__ import annotations

import copy

import official
import pytest
import torch
from torch import Tensor, nn


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))
    return body.double()


def sgd(net: nn.Module, weight_decay: float = 5e-4) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)


def sgd_without_decay(net: nn.Module) -> torch.optim.SGD:
    return sgd(net, 0.0)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 0.2 + 0.6 * torch.rand(12, 3, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 5, (12,), generator=generator)


@pytest.mark.parametrize("name", list(official.SOURCES))
def test_updates_are_those_of_momentum_sgd(name: str, net: nn.Module) -> None:
    """Noise comes from two generators of one seed, drawn in one order."""
    make = sgd_without_decay if name == "AWP" else sgd  # the authors decay the perturbed weights, ours the weights
    theirs = official.Official(name, copy.deepcopy(net).train(), 3, make)
    trainer = official.ours(name, net.train(), 3, step="eager", sgd=make)
    for step in range(4):
        theirs(*batch(step))
        trainer.step(*batch(step))
        if name == "TRADES":  # whose third forward pass moves the running statistics, which its attack sees, once more
            for mine, other in zip(net.buffers(), theirs.net.buffers(), strict=True):
                other.copy_(mine)
    found, expected = net.state_dict(), theirs.net.state_dict()
    for key, value in expected.items():
        if "running" not in key and "num" not in key:
            torch.testing.assert_close(
                found[key], value, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}"
            )
