"""From losses to a planned graph: the checks that every norm pass begins with, and the plan, made or remembered."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..distributed import on_any
from ..graph.combining import combined
from ..graph.plan import RESTLESS, STEADY, Plan, PlannedGraph
from ..graph.planning import make_plan
from ..graph.refusals import check_parameters
from ..graph.routed import may_be_told, plan_to_be_told
from ..graph.routing import signature_of, skeleton_of
from ..graph.trace import Trace, trace
from ..loss_checks import check_losses
from ..module import GradNormModule, couples
from ..ops import uncast
from ..terms.loss_scale import UNSCALED, LossScale
from ..torch_internals import has_gradient_hooks, is_recorded, unrecorded
from .identity import check_identity


def planned_losses(
    model: GradNormModule,
    losses: Tensor,
    *,
    check: bool | None = None,
    scale: LossScale = UNSCALED,
    watch: bool = True,
    use_up: bool = False,
) -> PlannedGraph:
    """The graph behind ``losses``, checked: it is this model's and captured, and gradients add up where that is due.

    Args:
        model: the wrapper that computed the losses.
        losses: ``[n]``, one loss an example.
        check: look for non-finite losses; default on the CPU only.
        scale: on the losses inside of backward passes.
        watch: compare the gradients with autograd's if that is due (strict).
        use_up: whether, where :func:`takes_one_pass`, the terms of one pass are all that is needed of the graph.

    Raises:
        TypeError, ValueError: the losses are no such vector, see :func:`engm.loss_checks.check_losses`.
        RuntimeError: no captured call of this model, examples that influence each other, or gradients that do not
            add up.
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
            "(not the network inside it), with gradients enabled, outside of model.paused(). If all layers that it "
            "runs are frozen, use the trained parameters inside of its forward pass and not in the loss alone."
        )
    with traced.still_buffers():
        return _planned(model, losses, traced, scale, watch, use_up)


def _planned(
    model: GradNormModule, losses: Tensor, traced: Trace, scale: LossScale, watch: bool, use_up: bool
) -> PlannedGraph:
    """See :func:`planned_losses`."""
    n = losses.shape[0]
    skeleton = skeleton_of(traced, n)
    signature = signature_of(traced, skeleton, n)
    group = traced.group
    known = model.engm_skeletons.restless(skeleton)
    with unrecorded():
        old = model.engm_plans.find(signature, traced)

    def measured() -> Plan:
        with unrecorded():
            cancels, once = known is not None and known.cancels, not model.engm_skeletons.come_again(skeleton)
            plan = make_plan(model, traced, losses, scale.factor, cancels, once)
        if old is not None:
            model.engm_skeletons.surprised(skeleton)
        # Plans that stand alone do not add up; others mostly do before long.
        if model.engm_skeletons.brief(skeleton, RESTLESS if plan.alone else STEADY) and (plan.alone or tells(plan)):
            plan = replace(plan, keeps=False)
            if old is not None:
                model.engm_plans.forget(signature, old)
        model.engm_skeletons.measured(skeleton, signature, plan)
        if plan.keeps:
            model.engm_plans.keep(signature, plan if old is None else combined(old, plan, traced), old)
        return plan

    def tells(plan: Plan) -> bool:
        return may_be_told(plan, traced, n) and model.engm_skeletons.may_tell(skeleton)

    def measured_after_all() -> Plan:
        model.engm_skeletons.untold(skeleton)
        return measured()

    if not on_any(group, old is None, losses.device) and old is not None:
        check_parameters(traced)  # the plan is of another step, and parameters may have been replaced since
        model.engm_skeletons.held(skeleton)
        graph = PlannedGraph(traced, old, n, model.engm_plans, measured, False, model.engm_watch.steps)
    elif known is not None and not (is_recorded() or model.engm_skeletons.often(signature)) and tells(known):
        check_parameters(traced)
        told = plan_to_be_told(traced, losses, known, scale.factor)
        model.engm_skeletons.told(skeleton, signature)
        fresh = told is None
        plan = measured_after_all() if told is None else told
        graph = PlannedGraph(traced, plan, n, model.engm_plans, measured_after_all, fresh, model.engm_watch.steps)
    else:
        graph = PlannedGraph(
            traced, measured(), n, model.engm_plans, measured, not is_recorded(), model.engm_watch.steps
        )
    graph.couples_elsewhere = group is not None and couples(model)
    if model.engm_observer is not None:
        model.engm_observer(graph, skeleton)
    strict = model.strict or bool(traced.tokens)  # what goes on in a compiled region is not seen otherwise
    watch = watch and strict and not is_recorded()  # a recorded step is held against one that was not
    structure = (skeleton, "hooked") if traced.hooked else skeleton
    # Hooks on a node do not run where examples are backpropagated one by one from there on.
    due = (watch and model.engm_watch.due(structure, model.check_every)) or (graph.plan.coupled and traced.hooked)
    if on_any(group, due and not graph.plan.blind, losses.device):
        use_up = use_up and takes_one_pass(graph) and graph.terms_stand_alone
        with uncast(losses.device):  # the caller's autocast may still be on, as in Lightning
            check_identity(graph, losses, model.engm_watch.steps, scale, use_up)
        model.engm_watch.passed(structure)
    return graph


def takes_one_pass(graph: PlannedGraph) -> bool:
    """Whether the gradient of reweighted losses can be made from the terms of the pass that norms are taken from.

    Nothing couples the examples, and no hooks hang on parameters, which only autograd's own accumulation runs.
    """
    return not graph.couples and not has_gradient_hooks(graph.parameters)
