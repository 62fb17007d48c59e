"""The factor that losses have inside of a backward pass, which float16 needs, and how results are freed of it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossScale:
    """Losses are multiplied by ``factor`` where they are backpropagated, and results are divided by it.

    Attributes:
        factor: positive and finite; 1 changes nothing and costs nothing.
    """

    factor: float = 1.0

    def seeds(self, losses: Tensor) -> Tensor:
        """The gradient ``[n]`` that backpropagates the scaled sum of the losses ``[n]``.

        Infinite where the factor is too large for their type, as in a scaled loss that was averaged in it.
        """
        return torch.ones_like(losses).mul_(self.factor)

    def scaled(self, losses: Tensor) -> Tensor:
        """The losses times the factor, with their graph."""
        return losses if self.factor == 1.0 else losses * self.factor

    def off_squares(self, squared_norms: Tensor) -> Tensor:
        """Squared norms of gradients of scaled losses, as those of the losses."""
        # The square of the factor may be too large for their type.
        return squared_norms if self.factor == 1.0 else squared_norms / self.factor / self.factor

    def off_norms(self, norms: Tensor) -> Tensor:
        """Norms of gradients of scaled losses, as those of the losses."""
        return norms if self.factor == 1.0 else norms / self.factor

    def off_gradients(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Gradients of scaled losses, as those of the losses; None where there is none."""
        if self.factor == 1.0:
            return tuple(gradients)
        return tuple(None if g is None else g / self.factor for g in gradients)


UNSCALED = LossScale()
