"""Which norm stands for the parameter gradient's: correlation and error of the weights (paper, section 2.5, Fig. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import engm
from engm.backward.prepare import planned_losses
from engm.checks import check_alpha
from engm.optim.aengm import fit_line
from engm.optim.weights import predicted_weights

from .batches import Statistics, copied, losses_of, split, wrapped

MEDIAN = "median"


@dataclass(frozen=True)
class NormCorrelation:
    """How predictors compare with the exact norms, on examples that nothing was fitted on.

    Attributes:
        examples: number of these examples.
        mean_norm: mean of the exact norms.
        slope: slope of A-ENGM's line, exact norms on input-gradient norms of the first batch (Eq. 6).
        intercept: intercept of this line.
        pearson: correlation with the exact norms, by predictor: ``"input"`` (N- and A-ENGM's), ``"engine"`` (ours).
        weight_errors: for each threshold (``"median"`` is that of the first batch's exact norms) the mean of
            ``|w' - w|`` by predictor, ``"line"``, ``"engine"`` and ``"input"`` (N-ENGM with the best single scale, the
            ratio of medians on the first batch), and ``"weight"``, the mean of ``w``.
    """

    examples: int
    mean_norm: float
    slope: float
    intercept: float
    pearson: dict[str, float]
    weight_errors: dict[str, dict[str, float]]


@dataclass(frozen=True)
class _Norms:
    """The norms of some examples, each ``[n]`` in float64."""

    exact: Tensor
    input: Tensor
    engine: Tensor


def norm_correlation(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    batch_size: int = 64,
    statistics: Statistics = "training",
    alphas: Sequence[float] = (0.1, 1.0, 3.0),
) -> NormCorrelation:
    """Compares norms of input gradients and the engine's estimates with exact norms of parameter gradients.

    The line and the engine's calibration factors come from the first batch; all figures are of the others. Exact norms
    take one backpropagation an example where batch statistics couple them; elsewhere the engine is exact.

    Args:
        net: the network; it is copied, and nothing of it changes.
        x: ``[N, ...]``, the examples as they are to be looked at.
        y: ``[N]`` labels.
        batch_size: examples a batch; divides ``N``, at least twice.
        statistics: ``"training"`` or ``"evaluation"``, the network's mode. The engine is exact in the second.
        alphas: thresholds to judge the weights at.

    Raises:
        ValueError: fewer than two batches, examples that do not fill whole batches, a threshold that is not positive,
            input-gradient norms that are all alike, so that no line goes through them, or a first batch half of which
            has no gradient.
    """
    alphas = [check_alpha(alpha) for alpha in alphas]
    batches = split(x, y, batch_size)
    if len(batches) < 2:
        raise ValueError(f"expected at least two batches, one to fit on, got {len(x)} examples in one of {batch_size}")
    with copied(net, statistics) as copy:
        model = wrapped(copy)
        first, *others = [_norms(model, *batch) for batch in batches]
    held = _Norms(*(torch.cat([getattr(o, name) for o in others]) for name in ("exact", "input", "engine")))
    coefficients, _, usable = fit_line(first.input, first.exact)
    if not bool(usable):
        raise ValueError("the input gradients of the first batch are all equally long: no line goes through them")
    slope, intercept = coefficients.tolist()
    median, input_median = first.exact.median(), first.input.median()
    if not (median > 0 and input_median > 0):
        raise ValueError("half of the first batch have no gradient: there is no median norm to compare at")
    predictors = {
        "line": slope * held.input + intercept,
        "engine": held.engine,
        "input": held.input * (median / input_median),
    }
    errors = {}
    for key, alpha in {**{f"{alpha:g}": alpha for alpha in alphas}, MEDIAN: median.item()}.items():
        weights = predicted_weights(held.exact, alpha)
        errors[key] = {name: _distance(predicted_weights(p, alpha), weights) for name, p in predictors.items()}
        errors[key]["weight"] = weights.mean().item()
    return NormCorrelation(
        len(held.exact),
        held.exact.mean().item(),
        slope,
        intercept,
        {"input": _pearson(held.input, held.exact), "engine": _pearson(held.engine, held.exact)},
        errors,
    )


def _norms(model: engm.GradNormModule, x: Tensor, y: Tensor) -> _Norms:
    """The engine calibrates on the first call and keeps its factors."""
    inputs = x.detach().clone().requires_grad_()
    losses = losses_of(model, inputs, y)
    engine = engm.per_example_grad_norms(model, losses)
    (gradients,) = torch.autograd.grad(losses.sum(), inputs, retain_graph=True)
    exact = engm.naive_grad_norms(model, losses) if planned_losses(model, losses).couples else engine
    return _Norms(exact.double(), gradients.double().flatten(1).norm(dim=1), engine.double())


def _distance(predicted: Tensor, exact: Tensor) -> float:
    return (predicted - exact).abs().mean().item()


def _pearson(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()
