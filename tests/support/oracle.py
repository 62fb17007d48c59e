"""The truth that tests compare with: float64, plain torch, one backpropagation an example, on a network of its own.

Nothing here knows how the engine works. Batch norms with frozen statistics are rebuilt as layers that take their
statistics from a detached copy of the input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import engm

TOLERANCE = {  # relative errors allowed
    "norm, float64": 1e-9,  # whole norms, and every tensor's
    "norm, float32": 1e-5,
    "norm, bfloat16": 2e-2,  # autocast, against one backpropagation an example of the same graph
    "floor": 1e-11,  # of a tensor's norm, as a share of the example's whole norm (gradients that are truly 0)
    "gradient, float64": 1e-9,
    "gradient, float32": 2e-5,
}


@dataclass
class Truth:
    """Per-example gradients by parameter name, ``[n, *shape]``, in float64."""

    gradients: dict[str, Tensor]

    @property
    def squared_norms(self) -> dict[str, Tensor]:
        return {name: g.square().reshape(len(g), -1).sum(1) for name, g in self.gradients.items()}

    @property
    def norms(self) -> Tensor:
        return torch.stack(list(self.squared_norms.values())).sum(0).sqrt()

    def update(self, weights: Tensor) -> dict[str, Tensor]:
        """``1/n sum_i w_i g_i``."""
        return {name: torch.tensordot(weights, g, dims=1) / len(weights) for name, g in self.gradients.items()}


def per_example_gradients(losses: Tensor, parameters: dict[str, Tensor]) -> Truth:
    """One ``torch.autograd.grad`` an example; zeros where a parameter is not reached."""
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for loss in losses:
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
            rows[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    return Truth({name: torch.stack(gradients).double() for name, gradients in rows.items()})


def trained(net: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def truth(net: nn.Module, loss_fn: Callable[[nn.Module], Tensor], *, frozen: bool = False) -> Truth:
    """Per-example gradients of ``loss_fn(net)`` on a float64 copy of ``net``.

    Args:
        net: a plain network; it is copied.
        loss_fn: takes the network and returns ``[n]`` losses, casting its data to the network's dtype.
        frozen: treat batch statistics as constants.
    """
    net = copy.deepcopy(net).double()
    if frozen:
        freeze_statistics(net)
    return per_example_gradients(loss_fn(net), trained(net))


class FrozenStatistics(nn.Module):
    """A batch norm whose batch statistics are constants in the backward pass."""

    def __init__(self, batch_norm: _BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = batch_norm.weight, batch_norm.bias, batch_norm.eps

    def forward(self, input: Tensor) -> Tensor:
        constant = input.detach()
        var, mean = torch.var_mean(constant, [0, *range(2, input.dim())], correction=0, keepdim=True)
        shape = [1, -1] + [1] * (input.dim() - 2)
        out = (input - mean) / (var + self.eps).sqrt()
        return out if self.weight is None else out * self.weight.view(shape) + self.bias.view(shape)


def freeze_statistics(net: nn.Module) -> None:
    """Replace, in place, every batch norm that takes its statistics from the batch."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm) and (child.training or child.running_mean is None):
                setattr(module, name, FrozenStatistics(child))


def random_losses(out: Tensor, seed: int = 0) -> Tensor:
    """``[n]`` losses that weigh every output differently and are not linear in them."""
    c = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (out * c.to(out.dtype) + 0.3 * out.square()).flatten(1).sum(1)


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dtype_of(net: nn.Module) -> torch.dtype:
    return next(net.parameters()).dtype


def relative(value: Tensor, expected: Tensor) -> float:
    """Largest relative error; 0 against 0 is none."""
    value, expected = value.detach().double(), expected.detach().double()
    return float(((value - expected).abs() / expected.abs().clamp_min(torch.finfo(torch.float64).tiny)).max())


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
