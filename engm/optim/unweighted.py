"""Does a step move the weights along gradients in which no example was weighted?

A loop whose ``losses.mean().backward()`` was left in the place of ``opt.backward(losses)`` would train without a word
as the inner optimizer alone does.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from .weights import StepStats


class UnweightedWatch:
    """Looks at every step; warns once of one whose gradients came neither from ``backward`` nor from ``reweight``."""

    def __init__(self) -> None:
        self._stepped: StepStats | None = None
        self._warned = False

    def look(self, stats: StepStats | None, groups: Sequence[dict[str, Any]]) -> None:
        """Warns where no example was weighted since the last step and this one moves a parameter.

        Args:
            stats: of the last ``backward`` or ``reweight``, a new object each time.
            groups: parameter groups of the optimizer; those whose learning rate is 0 stay where they are, as they do
                when the state of an optimizer is prepared for loading.
        """
        fresh, self._stepped = stats is not self._stepped, stats
        if fresh or self._warned:
            return
        moved = (group for group in groups if group.get("lr", 1) != 0)
        if any(parameter.grad is not None for group in moved for parameter in group["params"]):
            self._warned = True
            warnings.warn(
                "opt.step() takes gradients that came from neither opt.backward(losses) nor opt.reweight(losses) since "
                "the last step, so no example in them was weighted: call opt.backward(losses), one loss per example, "
                "in the place of losses.mean().backward(), or opt.reweight(losses).mean().backward().",
                stacklevel=3,
            )
