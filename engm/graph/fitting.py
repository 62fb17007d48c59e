"""What a call's rule can be told of where its examples lie, and where that is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..capture.calls import Call
from ..terms.layout import Layout
from ..terms.owners import NOBODY, Owners, Ownership
from .arrangement import without_trailing
from .owners import SEVERAL


def fits(call: Call, ownership: Ownership) -> bool:
    """Whether a call's rule can be told that its examples lie like this."""
    dims = 1 + ownership.dim if isinstance(ownership, Layout) else ownership.dims
    features = len(getattr(call.module, "normalized_shape", (0,)))  # the last dimensions, which belong together
    return dims <= (len(call.shape) - features if call.rule.positionwise else 1)


def agreed(parts: Sequence[Tensor]) -> Tensor:
    """The owners of a call's rows, from those in each of its outputs."""
    if len(parts) == 1:
        return parts[0]
    rows = [without_trailing(part) for part in parts]
    rows = [part if part.dim() == 1 else part.amax(tuple(range(1, part.dim()))) for part in rows]
    all_rows = torch.stack(rows)
    one = all_rows.amax(0)
    return torch.where(((all_rows != one) & (all_rows != NOBODY)).any(0), SEVERAL, one)


class OwnersOnDevice:
    """Puts owners where the losses are: the same object for the same owners, which keeps what it works out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[tuple[int, ...], list[tuple[Tensor, Owners]]] = {}

    def __call__(self, ownership: Ownership) -> Ownership:
        """The owners, given on the CPU, on the device; layouts as they are."""
        if isinstance(ownership, Layout):
            return ownership
        alike = self._known.setdefault(tuple(ownership.of.shape), [])
        for known, owners in alike:
            if torch.equal(known, ownership.of):
                return owners
        alike.append((ownership.of, Owners(ownership.of.to(self._device), ownership.n)))
        return alike[-1][1]
