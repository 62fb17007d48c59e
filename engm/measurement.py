"""Measuring, as users call it: squared norms and input gradients of a batch by one backward pass."""

from __future__ import annotations

from torch import Tensor, nn

from .backward.inputs import Inputs, input_gradients, input_rows, resolve_inputs, unscaled_inputs
from .backward.norms import (
    Measurement,
    calibrated_squared_norms,
    lent_mode,
    mapped_norms,
    measure_graph,
    own_mode,
)
from .backward.prepare import planned_losses
from .checks import check_positive
from .graph.trace import trace
from .loss_checks import check_losses
from .module import GradNormModule, as_wrapped
from .terms.loss_scale import LossScale


def measure(
    model: nn.Module,
    losses: Tensor,
    inputs: Inputs = None,
    *,
    norms: bool = True,
    loss_scale: float = 1.0,
    check: bool | None = None,
) -> Measurement:
    """Per-example squared gradient norms by one backward pass that computes no weight gradient.

    The primitive under all of engm. The graph is kept, ``p.grad`` is untouched. An attack's last step calls it in
    place of ``torch.autograd.grad(losses.sum(), inputs)``, whose gradient it gives, and passes the result on to
    ``opt.backward``. Where training-mode batch norm couples the examples that gradient takes a second backward pass.

    Args:
        model: a :class:`GradNormModule`.
        losses: ``[n]``, one loss an example, from a forward pass of ``model``.
        inputs: tensor (or tuple) whose gradient is wanted, of the sum of the losses; must require grad.
        norms: ``False`` measures the input gradients alone: an ordinary backward pass to ``inputs``, which must require
            grad, through batch statistics, of losses that need not be captured (a forward pass under ``model.paused()``
            will do). It is what N-ENGM always reads, and A-ENGM between two regressions.
        loss_scale: factor on the losses inside the pass, divided out again (float16).
        check: look for non-finite losses; default on the CPU only, because elsewhere looking synchronises.

    Returns:
        A :class:`Measurement`. Where training-mode batch norm couples the examples its norms are of the graph with
        frozen statistics, not calibrated (``batch_norm="exact"``: exact, and as slow as that is), and its input
        gradients go through the statistics.

    Raises:
        TypeError, ValueError, RuntimeError: the losses are not such a vector or belong to another model, examples
            influence each other, or gradients do not add up (strict); ``norms=False`` without inputs. Nothing is
            changed.
    """
    wrapped = as_wrapped(model)
    scale = LossScale(check_positive("loss_scale", loss_scale))
    if not norms:
        return _measure_inputs(wrapped, losses, inputs, scale, check)
    graph = planned_losses(wrapped, losses, check=check, scale=scale)
    return measure_graph(graph, losses, lent_mode(wrapped, graph), inputs, scale)


def _measure_inputs(
    model: GradNormModule, losses: Tensor, inputs: Inputs, scale: LossScale, check: bool | None
) -> Measurement:
    if inputs is None:
        raise ValueError("measure(norms=False) measures input gradients: pass inputs.")
    check_losses(losses, finite=check)
    leaves = resolve_inputs(None, inputs)
    traced = trace(losses, model, model.trainable_parameters())
    rows = input_rows(model.engm_plans, losses, leaves, traced)
    with traced.still_buffers():
        gradients = input_gradients(losses, leaves, scale)
    names = tuple(name for name, _ in model.trainable_parameters())
    packed, norms_of_scaled = unscaled_inputs(inputs, leaves, gradients, rows, losses.shape[0], scale)
    return Measurement(names, None, "exact", losses.detach(), packed, rows, norms_of_scaled)


def per_example_grad_norms(
    model: nn.Module, losses: Tensor, *, loss_scale: float = 1.0, check: bool | None = None
) -> Tensor:
    """Norms of the per-example gradients ``||dL_i/dtheta||`` over all trained parameters, by one backward pass.

    Under ``DistributedDataParallel`` they are of this rank's examples, and nothing is sent: any rank may ask alone.
    Under ``fully_shard``, where a backward pass gathers the parameters, all ranks have to ask.

    Args:
        model: a :class:`GradNormModule`.
        losses: ``[n]``, one loss an example, from a forward pass of ``model``; the graph stays usable.
        loss_scale: factor on the losses inside the pass, divided out again (float16).
        check: look for non-finite losses; default on the CPU only.

    Returns:
        ``[n]``, float64 for float64 models, else float32. Exact where nothing couples the examples; in training-mode
        batch norm as the model's ``batch_norm`` says, with the latest calibration factors there are (taken from this
        batch on first use).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`measure`.
    """
    wrapped = as_wrapped(model)
    scale = LossScale(check_positive("loss_scale", loss_scale))
    graph = planned_losses(wrapped, losses, check=check, scale=scale)
    measurement = measure_graph(graph, losses, own_mode(wrapped, graph), scale=scale)
    return mapped_norms(
        *calibrated_squared_norms(wrapped, graph, losses, measurement, borrowed=False, count=False, scale=scale)
    )
