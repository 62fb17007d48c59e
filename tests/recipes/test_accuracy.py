"""Accuracies against counting by hand, and what evaluation must leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import engm
from engm.adversarial import PGD
from engm.checks import NonFiniteError
from engm.recipes.accuracy import evaluate, pgd20
from engm.recipes.data import Split


@pytest.fixture
def split() -> Split:
    generator = torch.Generator().manual_seed(3)
    return Split(torch.rand(23, 1, 4, 4, generator=generator), torch.randint(3, (23,), generator=generator))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_have_no_accuracy(net: nn.Module, split: Split, value: float) -> None:
    with torch.no_grad():
        net[4].weight[0, 0] = value  # type: ignore[index]
    for attack in (None, PGD(0.1, 0.05, 2)):
        with pytest.raises(NonFiniteError, match="its accuracy means nothing"):
            evaluate(net, split, attack)


def test_counts_in_evaluation_mode_and_restores(net: nn.Module, split: Split) -> None:
    model = engm.GradNormModule(net.train())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = evaluate(model, split, PGD(0.1, 0.05, 2), batch_size=10)
    assert net.training
    assert net[1].training  # type: ignore[index]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    net.eval()
    assert found.natural * 23 == (net(split.inputs).argmax(1) == split.labels).sum().item()
    assert found.robust is not None
    assert found.robust < found.natural
    assert found.examples == 23


def test_without_an_attack(net: nn.Module, split: Split) -> None:
    assert evaluate(net, split).robust is None


def test_the_seed_decides(net: nn.Module, split: Split) -> None:
    attack = PGD(0.02, 0.01, 1)
    torch.manual_seed(1)
    first = evaluate(net, split, attack, seed=4)
    torch.manual_seed(2)
    assert evaluate(net, split, attack, seed=4) == first


def test_pgd20_is_the_papers(net: nn.Module) -> None:
    attack = pgd20(8 / 255)
    assert (attack.steps, attack.loss, attack.norm, attack.eval_mode) == (20, "margin", "linf", True)
    assert attack.step_size == pytest.approx(8 / 2550)


def test_bad_arguments(net: nn.Module, split: Split) -> None:
    with pytest.raises(ValueError, match="at least one example"):
        evaluate(net, Split(split.inputs[:0], split.labels[:0]))
    with pytest.raises(ValueError, match="evaluation mode"):
        evaluate(net, split, PGD(0.1, 0.05, 2, eval_mode=False))
