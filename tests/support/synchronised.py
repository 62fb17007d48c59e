"""torch's synchronised batch norm on the CPU: its kernels, which are CUDA's alone, in plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as SyncFunction


def channelwise(x: Tensor, *values: Tensor) -> Iterator[Tensor]:
    return (value.view([1, -1] + [1] * (x.dim() - 2)) for value in values)


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    return mean, torch.rsqrt(var + eps)


def gather_stats(
    x: Tensor,
    means: Tensor,
    rstds: Tensor,
    running_mean: Any,
    running_var: Any,
    momentum: Any,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    share = (counts / counts.sum()).unsqueeze(1)
    mean = (means * share).sum(0)
    var = ((rstds**-2 - eps + means**2) * share).sum(0) - mean**2
    return mean, torch.rsqrt(var + eps)


def normalise(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> Tensor:
    mean, rstd, weight, bias = channelwise(x, mean, rstd, weight, bias)
    return (x - mean) * rstd * weight + bias


def reduce_gradients(
    gy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, *wanted: bool
) -> tuple[Tensor, ...]:
    centred = x - next(channelwise(x, mean))
    dims = [0, *range(2, x.dim())]
    return gy.sum(dims), (gy * centred).sum(dims), (gy * centred).sum(dims) * rstd, gy.sum(dims)


def input_gradient(
    gy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    counts: Tensor,
) -> Tensor:
    mean, rstd, weight, sum_dy, sum_dy_xmu = channelwise(x, mean, rstd, weight, sum_dy, sum_dy_xmu)
    return (gy - (sum_dy + (x - mean) * rstd**2 * sum_dy_xmu) / counts.sum()) * rstd * weight


KERNELS: dict[str, Callable[..., Any]] = {
    "torch.batch_norm_stats": stats,
    "torch.batch_norm_gather_stats_with_counts": gather_stats,
    "torch.batch_norm_elemt": normalise,
    "torch.batch_norm_backward_reduce": reduce_gradients,
    "torch.batch_norm_backward_elemt": input_gradient,
}


def forward_over(group: Any, ranks: int) -> Callable[[nn.SyncBatchNorm, Tensor], Tensor]:
    """A forward of :class:`nn.SyncBatchNorm` that does not mind the device, over a group of so many ranks."""

    def forward(self: nn.SyncBatchNorm, x: Tensor) -> Tensor:
        options = (self.running_mean, self.running_var, self.eps, self.momentum, group, ranks)
        return SyncFunction.apply(x, self.weight, self.bias, *options)

    return forward
