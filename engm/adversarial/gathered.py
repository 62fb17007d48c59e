"""One measurement of a batch whose examples were measured in several passes, each in the pass in which it stopped."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor, nn

from ..measurement import Measurement
from ..module import as_wrapped
from ..terms.layout import PLAIN

# Shares of a batch that a pass over some examples is filled up to: each is another graph, which has to be planned once.
_SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)


class Gathered:
    """What passes over some of the examples each find out about them, by example.

    Args:
        n: number of examples.
        device: of the examples.
        norms: whether squared norms are gathered.

    Attributes:
        missing: ``[n]`` bool, the examples whose norms no pass has measured yet; none where none are gathered.
    """

    def __init__(self, n: int, device: torch.device, *, norms: bool) -> None:
        self.missing = torch.full((n,), norms, device=device)
        self._stacked: Tensor | None = None
        self._mode = "exact"  # as of a measurement of input gradients alone
        self._losses: Tensor | None = None
        self._gradients: Tensor | None = None

    def passed(self, rows: Tensor, losses: Tensor, gradient: Tensor) -> None:
        """Takes note of losses ``[k]`` and input gradients ``[k, ...]`` of the examples in ``rows [k]``."""
        if self._losses is None or self._gradients is None:
            n = len(self.missing)
            self._losses, self._gradients = losses.new_zeros(n), gradient.new_zeros(n, *gradient.shape[1:])
        self._losses[rows] = losses.detach()
        self._gradients[rows] = gradient

    def measured(self, rows: Tensor, measurement: Measurement, which: Tensor) -> None:
        """Takes the norms of those of the examples in ``rows [k]`` for which ``which [k]`` holds."""
        stacked, taken = measurement.require_stacked(), rows[which]
        if self._stacked is None:
            self._stacked = stacked.new_zeros(len(stacked), len(self.missing))
        self._stacked[:, taken] = stacked[:, which]
        self._mode = measurement.mode
        self.missing[taken] = False

    def rows_to_measure(self) -> Tensor:
        """The missing examples, and some others that fill their number up to one of a few."""
        missing = int(self.missing.sum())
        sizes = (ceil(share * len(self.missing)) for share in _SHARES)
        size = next(size for size in sizes if size >= missing) if missing else 0
        return self.missing.int().argsort(descending=True, stable=True)[:size]

    def measurement(self, model: nn.Module) -> Measurement:
        """The whole, when every example has been in a pass and none is missing; ``model`` is the wrapper."""
        assert self._losses is not None
        names = tuple(name for name, _ in as_wrapped(model).trainable_parameters())
        return Measurement(names, self._stacked, self._mode, self._losses, self._gradients, (PLAIN,))
