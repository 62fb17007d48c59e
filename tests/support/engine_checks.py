"""The engine held against the oracle: norms of every tensor and a clipped step, within one table of tolerances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracle import Truth, dtype_of, relative, truth
from torch import Tensor, nn

import engm

TOLERANCE = {  # relative errors allowed
    "norm, float64": 1e-9,  # whole norms, and every tensor's
    "norm, float32": 1e-5,
    "norm, bfloat16": 2e-2,  # autocast, against one backpropagation an example of the same graph
    "floor": 1e-11,  # of a tensor's norm, as a share of the example's whole norm (gradients that are truly 0)
    "gradient, float64": 1e-9,
    "gradient, float32": 2e-5,
}


def assert_measured(measurement: engm.Measurement, expected: Truth, precision: str = "float64") -> None:
    """Whole norms, and every tensor's norms, agree with the truth."""
    tolerance = TOLERANCE[f"norm, {precision}"]
    assert list(measurement.names) == list(expected.gradients)
    whole = expected.norms
    assert relative(measurement.norms, whole) <= tolerance
    floor = TOLERANCE["floor"] if precision == "float64" else tolerance
    for name, squared in measurement.squared_norms.items():
        true = expected.squared_norms[name].sqrt()
        error = (squared.double().sqrt() - true).abs()
        assert bool((error <= tolerance * true + floor * whole).all()), (name, squared.sqrt(), true)


def assert_step(model: engm.GradNormModule, losses: Tensor, expected: Truth, precision: str = "float64") -> None:
    """``ENGM.backward`` puts the truth's clipped mean gradient into ``p.grad`` (half of the examples are clipped)."""
    alpha = max(float(expected.norms.median()), 1e-3)
    weights = (alpha / expected.norms).clamp(max=1).nan_to_num(1.0)
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=alpha)
    opt.zero_grad()
    opt.backward(losses)
    wanted = expected.update(weights)
    scale = (weights * expected.norms).mean()  # not that of the sum, whose examples may cancel
    for name, parameter in model.unwrap().named_parameters():
        if parameter.requires_grad:
            got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert float((got.double() - wanted[name]).norm()) <= TOLERANCE[f"gradient, {precision}"] * float(scale)
    opt.zero_grad()


def check(
    net: nn.Module, loss_fn: Callable[[Any], Tensor], *, frozen: bool = False, step: bool = True, **wrap: Any
) -> engm.Measurement:
    """The engine on ``net`` against the truth: norms of every tensor, and (nothing couples) the clipped gradient."""
    precision = {torch.float64: "float64", torch.float32: "float32"}[dtype_of(net)]
    expected = truth(net, loss_fn, frozen=frozen)
    model = engm.GradNormModule(net, **wrap)
    losses = loss_fn(model)
    measurement = engm.measure(model, losses)
    assert measurement.mode == ("frozen" if frozen else "plain")
    assert measurement.stacked.dtype == dtype_of(net)
    assert_measured(measurement, expected, precision)
    if step and not frozen:
        assert_step(model, losses, expected, precision)
    return measurement
