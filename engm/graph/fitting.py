"""What a call's rule can be told of where its examples lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..capture.calls import Call
from ..terms.layout import Layout
from ..terms.owners import NOBODY, Ownership
from .arrangement import without_trailing
from .owners import SEVERAL
from .trace import Trace


def seen_by_collector(traced: Trace, number: int) -> bool:
    """Whether only a collector sees the gradient of a call, in the order that the call's rule has."""
    return traced.calls[number].rule.whole_call or traced.nodes[number] in traced.tokens


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
    agreed = torch.stack(rows).amax(0)
    differ = ((torch.stack(rows) != agreed) & (torch.stack(rows) != NOBODY)).any(0)
    return torch.where(differ, SEVERAL, agreed)
