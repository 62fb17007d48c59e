"""Figures of steps against the arithmetic that they are named after."""

from __future__ import annotations

import math

import pytest
import torch

from engm.optim import StepStats
from engm.recipes.training.step_figures import StepFigures, together


def stats(n: int, seed: int = 0) -> StepStats:
    generator = torch.Generator().manual_seed(seed)
    losses, weights, norms, inputs = torch.rand(4, n, generator=generator)
    return StepStats(losses, weights.mul(1.5).clamp(max=1), norms, inputs)


def test_means_quantiles_and_the_clipped_fraction() -> None:
    figures = StepFigures()
    step = stats(11)
    figures.add(step, torch.tensor(3.0))
    (found,) = figures.take()
    summary = found.summary()
    assert step.norms is not None
    assert step.input_norms is not None
    assert summary["loss"] == pytest.approx(step.losses.mean().item())
    assert summary["weight_mean"] == pytest.approx(step.weights.mean().item())
    assert summary["clipped"] == (step.weights < 1).sum().item() / 11
    for name, values in (("weight", step.weights), ("norm", step.norms), ("input_norm", step.input_norms)):
        ranked = values.sort().values.tolist()  # 11 examples: the deciles are examples
        keys = ("min", "q10", "median", "q90", "max")
        assert [summary[f"{name}_{key}"] for key in keys] == [ranked[rank] for rank in (0, 1, 5, 9, 10)]
    assert summary["norm_mean"] == pytest.approx(step.norms.mean().item())
    assert summary["gradient_norm"] == 3.0


def test_methods_without_norms_have_no_figures_of_them() -> None:
    figures = StepFigures()
    figures.add(StepStats(torch.ones(3), torch.ones(3)))
    assert set(figures.take()[0].summary()) == {
        "loss", "clipped", "weight_mean", "weight_min", "weight_q10", "weight_median", "weight_q90", "weight_max",
    }  # fmt: skip


def test_steps_of_different_sizes_stay_apart_and_come_once() -> None:
    figures = StepFigures()
    for n in (4, 1, 7):
        figures.add(stats(n, seed=n))
    steps = figures.take()
    assert [len(step.losses) for step in steps] == [4, 1, 7]
    assert torch.equal(steps[2].weights, stats(7, seed=7).weights.double())
    assert len(together(steps).losses) == 12
    assert together(steps).summary()["norm_max"] == max(step.summary()["norm_max"] for step in steps)
    assert figures.take() == []


def test_adding_reads_nothing() -> None:
    """Tensors without data cannot be read: whoever waits for the device fails here."""
    with torch.device("meta"):
        StepFigures().add(StepStats(torch.ones(3), torch.ones(3), torch.ones(3)), torch.ones(()))


def test_weights_by_group_are_weights() -> None:
    figures = StepFigures()
    figures.add(StepStats(torch.ones(4), torch.tensor([[1.0] * 4, [0.5] * 4]), torch.ones(2, 4)))
    summary = figures.take()[0].summary()
    assert (summary["weight_mean"], summary["clipped"], summary["loss"]) == (0.75, 0.5, 1.0)


def test_a_broken_step_shows() -> None:
    figures = StepFigures()
    norms = torch.tensor([1.0, math.nan, 2.0])
    figures.add(StepStats(norms, norms, norms))
    summary = figures.take()[0].summary()
    assert math.isnan(summary["loss"])
    assert math.isnan(summary["norm_max"])
    assert summary["norm_min"] == 1.0


def test_optimizers_cannot_be_mixed() -> None:
    figures = StepFigures()
    figures.add(stats(3))
    figures.add(StepStats(torch.ones(3), torch.ones(3)))
    with pytest.raises(ValueError, match="different optimizers"):
        figures.take()
