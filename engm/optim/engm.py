"""ENGM (paper, Eq. 5): clip every example's gradient before averaging."""

from __future__ import annotations

import torch
from torch import nn

from .base import ExampleOptimizer
from .problem import Problem, Weighting


def check_alpha(alpha: float) -> float:
    """``alpha`` as a positive float (``inf`` is allowed and clips nothing).

    Raises:
        ValueError: not a positive number.
    """
    try:
        value = float(alpha)
    except (TypeError, ValueError):
        raise ValueError(f"alpha must be a positive number, got {alpha!r}.") from None
    if not value > 0:
        raise ValueError(f"alpha must be positive, got {alpha!r}; engm.alpha_for(net) suggests one.")
    return value


class ENGM(ExampleOptimizer):
    """Example-normalised gradient descent with momentum, ``w_i = min(alpha / ||dL_i/dtheta||, 1)`` (Eq. 5).

    Exact where nothing couples the examples. In training-mode batch norm the norms are what the model's
    ``batch_norm`` says, and the update is the exact gradient of the reweighted loss through the statistics.

    Args:
        model: a :class:`engm.GradNormModule`.
        optimizer: any torch optimizer; the paper's is SGD with momentum 0.9 and weight decay 5e-4. Weight decay is the
            optimizer's and no part of the norm.
        alpha: the largest norm an example's gradient may have; 5 for ResNet-18, see :func:`engm.alpha_for`.

    Raises:
        TypeError: as :class:`ExampleOptimizer`.
        ValueError: ``alpha`` is not positive.
    """

    uses_norms = True
    _shown = ("alpha",)
    _hyperparameters = ("alpha",)

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, alpha: float) -> None:
        self.alpha = check_alpha(alpha)
        super().__init__(model, optimizer)

    def _weights(self, problem: Problem) -> Weighting:
        norms, weights = problem.clipped(check_alpha(self.alpha))
        return Weighting(weights, norms)
