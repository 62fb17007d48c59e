"""The truth that tests compare with: one backpropagation an example, in plain torch and float64.

Nothing here knows the engine. :func:`truth` computes on a float64 copy of a network, and
:func:`per_example_gradients` takes losses that a test has already computed. Batch norms with frozen statistics are
rebuilt as layers that take their statistics from a detached copy of the input. The random inputs and losses that most
tests share are here too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass
class Truth:
    """Per-example gradients by parameter name, ``[n, *shape]``, in float64."""

    gradients: dict[str, Tensor]

    @property
    def squared_norms(self) -> dict[str, Tensor]:
        return {name: g.abs().square().reshape(len(g), -1).sum(1) for name, g in self.gradients.items()}

    @property
    def norms(self) -> Tensor:
        """Norms ``[n]`` over all parameters."""
        return torch.stack(list(self.squared_norms.values())).sum(0).sqrt()

    @property
    def flat(self) -> Tensor:
        """``[n, P]``: the gradient of every example as one vector."""
        return torch.cat([g.flatten(1) for g in self.gradients.values()], 1)

    def update(self, weights: Tensor, divisor: float | None = None) -> dict[str, Tensor]:
        """``1 / divisor * sum_i w_i g_i`` by parameter name; the divisor is ``n`` unless another is given."""
        divisor = len(weights) if divisor is None else divisor
        return {name: torch.tensordot(weights.to(g.dtype), g, dims=1) / divisor for name, g in self.gradients.items()}

    def mean(self, weights: Tensor, divisor: float | None = None) -> list[Tensor]:
        """The same as :meth:`update`, in the order of the parameters and without their names."""
        return list(self.update(weights, divisor).values())

    def part(self, names: Iterable[str]) -> Truth:
        """The gradients of some parameters only."""
        return Truth({name: self.gradients[name] for name in names})


def per_example_gradients(losses: Iterable[Tensor], parameters: dict[str, Tensor]) -> Truth:
    """One ``torch.autograd.grad`` an example; zeros where a parameter is not reached."""
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for loss in losses:
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
            rows[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    stacked = {name: torch.stack(gradients) for name, gradients in rows.items()}
    return Truth({name: g.to(torch.promote_types(g.dtype, torch.float64)) for name, g in stacked.items()})


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
    """The largest relative error; 0 against 0 counts as no error."""
    value, expected = value.detach().double(), expected.detach().double()
    return float(((value - expected).abs() / expected.abs().clamp_min(torch.finfo(torch.float64).tiny)).max())
