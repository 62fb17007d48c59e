"""Statistics of gradients against stored per-example gradients in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from little_network import Net
from oracle import truth
from torch import Tensor, nn

import engm
from engm.recipes.analysis import GradientStatistics, gradient_statistics

Untouched = Callable[[nn.Module], AbstractContextManager[None]]


def network(norm: bool = True) -> nn.Module:
    """Two batch norms: the engine's correction is exact for a single one."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU()]
    layers += [nn.Conv2d(4, 3, 3, stride=2), nn.BatchNorm2d(3) if norm else nn.Identity(), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 3)).double()
    net(torch.rand(9, 2, 5, 6, dtype=torch.float64))  # running statistics unlike those of any batch
    return net


def examples(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, 5, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def stored(net: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Losses ``[N]`` and gradients ``[N, P]``, one backpropagation an example, each batch by itself."""
    losses, gradients = [], []
    for inputs, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):

        def loss(model: nn.Module, inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
            return F.cross_entropy(model(inputs), labels, reduction="none")

        found = truth(net, loss).gradients.values()
        gradients.append(torch.cat([g.flatten(1) for g in found], dim=1))
        with torch.no_grad():
            losses.append(loss(net))
    return torch.cat(losses), torch.cat(gradients)


def assert_exact(found: GradientStatistics, losses: Tensor, gradients: Tensor) -> None:
    norms, mean = gradients.norm(dim=1), gradients.mean(dim=0)
    assert found.examples == len(losses)
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-12)
    assert found.mean_norm == pytest.approx(norms.mean().item(), rel=1e-9)
    assert found.mean_squared_norm == pytest.approx(norms.square().mean().item(), rel=1e-9)
    assert found.mean_gradient_norm == pytest.approx(mean.norm().item(), rel=1e-9)
    scatter = (gradients - mean).square().sum(dim=1).mean().item()  # by its definition, not as a difference
    assert found.variance == pytest.approx(scatter, rel=1e-8, abs=1e-12)


@given(batches=st.integers(1, 3), batch_size=st.integers(1, 7), seed=st.integers(0, 99))
def test_evaluation_mode_is_exact(batches: int, batch_size: int, seed: int) -> None:
    net, (x, y) = network(), examples(batches * batch_size, seed)
    found = gradient_statistics(net, x, y, batch_size=batch_size, statistics="evaluation")
    assert_exact(found, *stored(net.eval(), x, y, len(x)))


@given(batches=st.integers(1, 3), batch_size=st.integers(1, 7))
def test_training_mode_is_exact_where_nothing_couples(batches: int, batch_size: int) -> None:
    torch.manual_seed(0)
    net = Net().double()
    generator = torch.Generator().manual_seed(batches)
    x = torch.randn(batches * batch_size, 3, 5, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (len(x),), generator=generator)
    assert_exact(gradient_statistics(net, x, y, batch_size=batch_size), *stored(net, x, y, len(x)))


def test_training_mode_goes_through_the_statistics_of_every_batch() -> None:
    net, (x, y) = network(), examples(96)
    found = gradient_statistics(net.eval(), x, y, batch_size=32)  # the mode is the measurement's, not the network's
    losses, gradients = stored(net.train(), x, y, 32)
    norms = gradients.norm(dim=1)
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-12)
    assert found.mean_gradient_norm == pytest.approx(gradients.mean(dim=0).norm().item(), rel=1e-9)
    assert found.mean_norm == pytest.approx(norms.mean().item(), rel=0.03)
    assert found.variance == pytest.approx((gradients - gradients.mean(dim=0)).square().sum(1).mean().item(), rel=0.06)
    frozen = engm.GradNormModule(net, batch_norm="frozen")
    raw = engm.per_example_grad_norms(frozen, F.cross_entropy(frozen(x[:32]), y[:32], reduction="none"))
    assert abs(raw.mean() / norms[:32].mean() - 1) > 0.06  # so that the calibration is needed to come as near


def test_every_batch_is_calibrated_by_itself() -> None:
    net, (x, y) = network(), examples(16)
    x[8:] = 0.5 + 0.1 * (x[8:] - 0.5)  # factors of the first batch would be wrong for the second
    both = gradient_statistics(net, x, y, batch_size=8)
    parts = [gradient_statistics(net, x[rows], y[rows], batch_size=8) for rows in (slice(0, 8), slice(8, 16))]
    assert both.mean_norm == pytest.approx(sum(part.mean_norm for part in parts) / 2, rel=1e-12)
    assert both.mean_squared_norm == pytest.approx(sum(part.mean_squared_norm for part in parts) / 2, rel=1e-12)


def test_one_example_has_no_variance() -> None:
    found = gradient_statistics(network(), *examples(1), batch_size=1, statistics="evaluation")
    assert found.mean_norm == pytest.approx(found.mean_gradient_norm)
    assert 0 <= found.variance < 1e-12 * found.mean_squared_norm


def test_frozen_parameters_do_not_count() -> None:
    net, (x, y) = network(norm=False), examples(6)
    net[0].requires_grad_(False)
    assert_exact(gradient_statistics(net, x, y, batch_size=3), *stored(net, x, y, 6))


def test_parameters_that_the_losses_do_not_reach_have_no_gradient() -> None:
    net, (x, y) = network(), examples(6)
    wanted = gradient_statistics(net, x, y, batch_size=3)
    net[0].register_module("spare", nn.Linear(2, 2).double())
    found = gradient_statistics(net, x, y, batch_size=3)
    assert asdict(found) == pytest.approx(asdict(wanted), rel=1e-12)


def test_float32_agrees_with_float64() -> None:
    net, (x, y) = network(), examples(12)
    wanted = gradient_statistics(net, x, y, batch_size=6, statistics="evaluation")
    found = gradient_statistics(net.float(), x.float(), y, batch_size=6, statistics="evaluation")
    assert found.mean_norm == pytest.approx(wanted.mean_norm, rel=1e-5)
    assert found.variance == pytest.approx(wanted.variance, rel=1e-4)


@pytest.mark.parametrize("statistics", ["training", "evaluation"])
def test_leaves_everything_as_it_was(statistics: str, untouched: Untouched) -> None:
    net, (x, y) = nn.Sequential(nn.Dropout(0.3), *network()), examples(8)
    net[2].eval()  # a mode that no call to train() would give back
    with untouched(net), torch.no_grad():
        gradient_statistics(net, x, y, batch_size=4, statistics=statistics)  # type: ignore[arg-type]
        assert not torch.is_grad_enabled()
    assert x.grad is None


def test_bad_arguments() -> None:
    net, (x, y) = network(), examples(8)
    for batch_size in (3, 16, 0):
        with pytest.raises(ValueError, match=f"whole batches of {batch_size}"):
            gradient_statistics(net, x, y, batch_size=batch_size)
    with pytest.raises(ValueError, match="0 examples"):
        gradient_statistics(net, x[:0], y[:0])
    with pytest.raises(ValueError, match="7 labels"):
        gradient_statistics(net, x, y[:7], batch_size=4)
    with pytest.raises(ValueError, match="statistics"):
        gradient_statistics(net, x, y, statistics="train")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unwrap"):
        gradient_statistics(engm.GradNormModule(net), x, y, batch_size=4)
    with pytest.raises(ValueError, match="not finite"):
        gradient_statistics(net, x * float("inf"), y, batch_size=4)
