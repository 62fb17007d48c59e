"""The controls: ENGM whose weights go to other examples of the batch, or of which every example has the mean.

Both take steps of the length of ENGM's. Whatever ENGM gains over them, it gains by which example is clipped; whatever
they gain over momentum SGD has to do with the length of a step, or with noise. ``engm train --optimizer FILE.py:NAME``
calls them with the wrapped network and its SGD.
"""

from __future__ import annotations

import torch
from regime import ALPHAS
from torch import Tensor

import engm


def _clipped(norms: Tensor, alpha: Tensor) -> Tensor:
    return (alpha / norms).clamp(max=1.0)


def _permuted(norms: Tensor, alpha: Tensor) -> Tensor:
    weights = _clipped(norms, alpha)
    return weights[torch.randperm(len(weights), device=weights.device)]


def _mean(norms: Tensor, alpha: Tensor) -> Tensor:
    return _clipped(norms, alpha).mean().expand_as(norms)


def permuted_low(model: engm.GradNormModule, inner: torch.optim.Optimizer) -> engm.ENGM:
    """The lower threshold, and the weights of each batch in another order, drawn anew at every step."""
    return engm.ENGM(model, inner, min(ALPHAS), weigh=_permuted)


def permuted_high(model: engm.GradNormModule, inner: torch.optim.Optimizer) -> engm.ENGM:
    """The same with the higher threshold."""
    return engm.ENGM(model, inner, max(ALPHAS), weigh=_permuted)


def mean_low(model: engm.GradNormModule, inner: torch.optim.Optimizer) -> engm.ENGM:
    """The lower threshold, and the mean weight of each batch for all of its examples."""
    return engm.ENGM(model, inner, min(ALPHAS), weigh=_mean)


def mean_high(model: engm.GradNormModule, inner: torch.optim.Optimizer) -> engm.ENGM:
    """The same with the higher threshold."""
    return engm.ENGM(model, inner, max(ALPHAS), weigh=_mean)
