"""Correlations, lines and errors of weights against numpy on norms from written-out loops in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import truth
from torch import Tensor, nn

import engm
from engm.recipes.analysis import NormCorrelation, norm_correlation

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
Array = np.ndarray


def network() -> nn.Module:
    """Two batch norms: the engine's correction is exact for a single one."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    layers += [nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 3)).double()
    net(torch.rand(9, 2, 5, 6, dtype=torch.float64))  # running statistics unlike those of any batch
    return net


def examples(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, 5, 6, generator=generator, dtype=torch.float64)
    return x * torch.rand(n, 1, 1, 1, generator=generator), torch.randint(3, (n,), generator=generator)


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def exact_and_input_norms(net: nn.Module, x: Tensor, y: Tensor) -> tuple[Array, Array]:
    """``[N]`` each, of one batch in the mode that ``net`` is in."""
    inputs = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses_of(copy.deepcopy(net), inputs, y).sum(), inputs)
    exact = truth(net, lambda model: losses_of(model, x, y)).norms
    return exact.numpy(), np.array([g.norm().item() for g in gradient])


def weights_of(norms: Array, alpha: float) -> Array:
    return np.array([1.0 if g <= 0 else min(alpha / g, 1.0) for g in norms])


def lower_median(values: Array) -> float:
    return float(np.sort(values)[(len(values) - 1) // 2])


def assert_agrees(
    found: NormCorrelation, first: tuple[Array, Array], others: list[tuple[Array, Array]], engine: Array
) -> None:
    """Everything from the norms, by numpy; ``engine`` are the engine's of the held-out examples."""
    exact, inputs = (np.concatenate(parts) for parts in zip(*others, strict=True))
    slope, intercept = np.polyfit(first[1], first[0], 1)
    assert found.examples == len(exact)
    assert found.mean_norm == pytest.approx(exact.mean(), rel=1e-9)
    assert found.slope == pytest.approx(slope, rel=1e-6)
    assert found.intercept == pytest.approx(intercept, rel=1e-6, abs=1e-9)
    assert found.pearson["input"] == pytest.approx(np.corrcoef(inputs, exact)[0, 1], abs=1e-9)
    assert found.pearson["engine"] == pytest.approx(np.corrcoef(engine, exact)[0, 1], abs=1e-9)
    median = lower_median(first[0])
    predictors = {
        "line": slope * inputs + intercept,
        "engine": engine,
        "input": inputs * median / lower_median(first[1]),
    }
    for key, errors in found.weight_errors.items():
        alpha = median if key == "median" else float(key)
        wanted = weights_of(exact, alpha)
        assert errors["weight"] == pytest.approx(wanted.mean(), rel=1e-9)
        for name, predicted in predictors.items():
            assert errors[name] == pytest.approx(np.abs(weights_of(predicted, alpha) - wanted).mean(), abs=1e-9)


@given(held_out=st.integers(1, 2), batch_size=st.integers(3, 8), seed=st.integers(0, 99))
def test_evaluation_mode(held_out: int, batch_size: int, seed: int) -> None:
    net, (x, y) = network(), examples((1 + held_out) * batch_size, seed)
    found = norm_correlation(net, x, y, batch_size=batch_size, statistics="evaluation", alphas=(0.5, 2.0))
    net.eval()
    parts = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    first, *others = [exact_and_input_norms(net, *part) for part in parts]
    assert_agrees(found, first, others, np.concatenate([exact for exact, _ in others]))
    assert list(found.weight_errors) == ["0.5", "2", "median"]
    assert found.pearson["engine"] == pytest.approx(1, abs=1e-9)
    assert all(errors["engine"] < 1e-9 for errors in found.weight_errors.values())


def test_training_mode_goes_through_the_statistics_and_calibrates_on_the_first_batch() -> None:
    net, (x, y) = network(), examples(96)
    found = norm_correlation(net.eval(), x, y, batch_size=32)  # the mode is the measurement's, not the network's
    net.train()
    parts = list(zip(x.split(32), y.split(32), strict=True))
    first, *others = [exact_and_input_norms(net, *part) for part in parts]
    model = engm.GradNormModule(copy.deepcopy(net))
    calibrated = [engm.per_example_grad_norms(model, losses_of(model, *part)).numpy() for part in parts]
    assert model.calibration.sample.draws == 1
    assert_agrees(found, first, others, np.concatenate(calibrated[1:]))
    assert found.pearson["engine"] > max(found.pearson["input"], 0.9)
    assert found.weight_errors["median"]["engine"] < found.weight_errors["median"]["input"]


def test_a_line_that_is_not_positive_weighs_one() -> None:
    """Norms that fall with the input's: the line crosses zero among the held-out examples."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(2))
    x = torch.tensor([[9.0, 9.2], [0.1, 5.0], [0.3, 0.1], [0.0, 4.0], [0.0, 50.0], [12.0, 12.1]], dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1, 1, 0])
    found = norm_correlation(net, x, y, batch_size=3, alphas=(1.0,), statistics="evaluation")
    first, other = (exact_and_input_norms(net, x[rows], y[rows]) for rows in (slice(0, 3), slice(3, 6)))
    assert (np.polyval([found.slope, found.intercept], other[1]) <= 0).any()
    assert_agrees(found, first, [other], other[0])


@pytest.mark.parametrize("statistics", ["training", "evaluation"])
def test_leaves_everything_as_it_was(statistics: str, untouched: Untouched) -> None:
    net, (x, y) = nn.Sequential(nn.Dropout(0.3), *network()), examples(8)
    net[2].eval()
    with untouched(net), torch.no_grad():
        norm_correlation(net, x, y, batch_size=4, statistics=statistics)  # type: ignore[arg-type]
    assert x.grad is None
    assert not x.requires_grad


def test_bad_arguments() -> None:
    net, (x, y) = network(), examples(8)
    with pytest.raises(ValueError, match="at least two batches"):
        norm_correlation(net, x, y, batch_size=8)
    with pytest.raises(ValueError, match="whole batches of 3"):
        norm_correlation(net, x, y, batch_size=3)
    with pytest.raises(ValueError, match="equally long"):
        norm_correlation(net, x[:1].expand(8, -1, -1, -1), y[:1].expand(8), batch_size=4, statistics="evaluation")
    with pytest.raises(ValueError, match="alpha must be positive"):
        norm_correlation(net, x, y, batch_size=4, alphas=(1.0, -1.0))
    sure = nn.Sequential(nn.Flatten(), nn.Linear(60, 3)).double()
    with torch.no_grad():
        sure[1].bias.copy_(torch.tensor([900.0, 0, 0]))
    with pytest.raises(ValueError, match="half of the first batch have no gradient"):
        norm_correlation(sure, x, torch.tensor([0, 0, 0, 1, 0, 1, 0, 1]), batch_size=4)
    with pytest.raises(ValueError, match="statistics"):
        norm_correlation(net, x, y, batch_size=4, statistics="eval")  # type: ignore[arg-type]
