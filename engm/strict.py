"""Strict checks: is the graph behind these losses one whose per-example gradients the engine can see whole?

Run once for every structure of a graph (which layers were called, in which order and mode), because a graph of the
same structure gives the same answer. They cost one backward pass without weight gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .graph import Trace
from .session import Session

if TYPE_CHECKING:
    from .module import GradNormModule


def structure_of(traced: Trace, n: int) -> tuple[Any, ...]:
    """What a strict verdict depends on: the calls in order, their modes, uses of leaves, and whether n > 1."""
    uses = sum(len(users) for _, users in traced.uses.values())
    return (n > 1, uses, tuple((id(call.module), call.couples, len(call.parameters)) for call in traced.calls))


def check_uses(model: GradNormModule, traced: Trace) -> None:
    """Every use of a trained parameter must lie inside a captured call.

    Raises:
        RuntimeError: names the parameters and the autograd nodes that use them, or what hides them.
    """
    hidden = [node.name() for node in traced.consumers() if node.name().startswith("CheckpointFunction")]
    if hidden:
        raise RuntimeError(
            f"engm: the losses run through {hidden[0]}, torch.utils.checkpoint with use_reentrant=True, which hides "
            "the layers inside from the graph. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )
    unseen = traced.unseen_uses(model.trainable_parameters())
    if unseen:
        shown = ", ".join(f"'{name}' (by {node})" for name, node in unseen[:5])
        raise RuntimeError(
            f"engm: the losses use {shown} outside of the layer calls that were captured, so a part of these "
            "parameters' per-example gradients cannot be seen. Call the layer itself instead of "
            "F.linear(x, layer.weight) and the like, call the wrapped model rather than the network inside it, freeze "
            "the parameter, or put the computation into a module and give it a rule with engm.register_rule."
        )


def check_rows(model: GradNormModule, traced: Trace, losses: Tensor) -> None:
    """Losses of some examples must not reach the rows of others, batch norms aside.

    Half of the losses, drawn by a fixed seed, are backpropagated with frozen statistics; every captured layer's
    backprops must be exactly zero in the other rows.

    Raises:
        RuntimeError: names the layer nearest to the losses where they are not.
    """
    n = losses.shape[0]
    if n < 2:
        return
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n), device="cpu")
    active = torch.zeros(n, dtype=torch.bool, device="cpu")
    active[order[: (n + 1) // 2]] = True
    active = active.to(losses.device)
    session = Session(model, traced, n, norms=False, idle_rows=~active)
    session.run(losses, active.to(losses.dtype), frozen=True, retain_graph=True)
