"""From losses to a planned graph: the checks that every norm pass begins with, and the plan, made or remembered."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_losses
from ..graph.plan import PlannedGraph
from ..graph.planning import check_parameters, make_plan, signature_of
from ..graph.trace import trace
from ..module import GradNormModule
from .sum_check import check_sums


def planned_losses(model: GradNormModule, losses: Tensor, *, check: bool | None = None) -> PlannedGraph:
    """The graph behind ``losses``, checked: it is this model's, captured, and (strict) all of it can be seen.

    Args:
        model: the wrapper that computed the losses.
        losses: ``[n]``, one loss an example.
        check: look for non-finite losses; default on the CPU only.

    Raises:
        TypeError, ValueError: the losses are no such vector, see :func:`engm.checks.check_losses`.
        RuntimeError: no captured call of this model, or a strict check fails.
    """
    check_losses(losses, finite=check)
    trained = model.trainable_parameters()
    if not trained:
        raise ValueError("none of the model's parameters require grad, so there is no norm to take.")
    traced = trace(losses, model, trained)
    if not traced.own_captures:
        if traced.captures:
            raise RuntimeError("these losses belong to another GradNormModule: pass the model that computed them.")
        raise RuntimeError(
            "these losses were not computed by a captured forward pass of this model. Call the GradNormModule itself "
            "(not the network inside it), with gradients enabled, outside of model.paused()."
        )
    n = losses.shape[0]
    together = model.shard_group is not None  # every backward pass is of all ranks, so all of them have to plan
    signature = signature_of(traced, n, together)
    plan = model.plans.get(signature)
    if plan is not None:
        check_parameters(traced)  # the plan is of another step, and parameters may have been replaced since
        return PlannedGraph(traced, plan, n)
    plan, sure = make_plan(model, traced, losses)
    graph = PlannedGraph(traced, plan, n)
    if traced.tokens:
        check_sums(graph, losses)
    if together or (
        sure and bool(torch.isfinite(losses.detach()).all())
    ):  # a NaN proves nothing, so the next graph is looked at again
        model.plans.keep(signature, plan)
    return graph
