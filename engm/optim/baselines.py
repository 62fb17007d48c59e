"""What ENGM is compared with."""

from __future__ import annotations

import torch

from .base import ExampleOptimizer
from .problem import Problem, Weighting


class MSGD(ExampleOptimizer):
    """The plain optimizer behind the same face: every weight is 1 (with SGD and momentum: the paper's Eq. 3).

    ``backward(losses)`` does what ``losses.mean().backward()`` does, at that cost; norms are not computed.

    Args:
        model: a :class:`engm.GradNormModule`.
        optimizer: any torch optimizer.

    Raises:
        TypeError: as :class:`ExampleOptimizer`.
    """

    def _weights(self, problem: Problem) -> Weighting:
        return Weighting(torch.ones_like(problem.losses.detach()))
