"""A threshold that follows the norms: the user says which fraction of the examples to clip."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningQuantile:
    """An exponential average of every batch's ``1 - fraction`` quantile of the norms above 0; never synchronises.

    Args:
        fraction: of the examples with a gradient that should lie above, in (0, 1).
        smoothing: share of the old value in the new one, in [0, 1).

    Attributes:
        value: the average, 0-dimensional; None before the first batch.
    """

    def __init__(self, fraction: float, smoothing: float = 0.9) -> None:
        if not isinstance(fraction, int | float) or not 0 < fraction < 1:
            raise ValueError(f"clip_fraction must lie between 0 and 1, got {fraction!r}.")
        if not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {smoothing!r}.")
        self.fraction = float(fraction)
        self.smoothing = float(smoothing)
        self.value: Tensor | None = None

    def following(self, norms: Tensor) -> Tensor:
        """The value after a batch with these norms ``[n]``, those of all ranks; ``value`` is left alone.

        The first is the batch's own quantile. A batch whose quantile is not finite, or in which no example has a
        gradient, changes nothing, and a value that is not finite (a first batch like that) is replaced whole. Examples
        without a gradient (masked losses, hinges) are never clipped, and would make it 0 if they were many.
        """
        fresh = torch.nanquantile(torch.where(norms == 0, torch.nan, norms), 1 - self.fraction)
        fresh = torch.where(norms.isnan().any(), torch.nan, fresh)
        if self.value is None:
            return fresh
        old = self.value.to(fresh)
        mixed = self.smoothing * old + (1 - self.smoothing) * fresh
        return torch.where(fresh.isfinite(), torch.where(old.isfinite(), mixed, fresh), old)
