"""Measuring: the one backward pass that everything else is built on, and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .crosscheck import check_sums
from .distributed import group_of
from .exact import check_losses, exact_squared_norms
from .graph import Trace, trace
from .module import GradNormModule
from .reach import check_parameters
from .session import Session
from .strict import make_plan, structure_of
from .terms import accumulation_dtype

Inputs = Tensor | Sequence[Tensor] | None
MOST_PLANS = 256  # remembered; layers that are skipped at random make a new structure at almost every step


@dataclass(frozen=True)
class Measurement:
    """Per-example squared gradient norms, and input gradients if asked for, from one backward pass.

    Attributes:
        names: the parameter tensors, in the order of the network.
        stacked: squared norms ``[L, n]``, one row a parameter tensor; float64 for float64 losses, else float32. None if
            only input gradients were measured (``norms=False``).
        mode: how batch statistics were treated: ``"plain"`` (nothing couples the examples: the norms are exact),
            ``"frozen"`` (batch norms in training mode as constants), ``"corrected"`` (the same, with the local
            correction of :mod:`engm.correction`; never from :func:`measure`) or ``"exact"`` (through the statistics,
            as are input gradients that were measured alone).
        losses: ``[n]``, detached.
        input_grads: gradient of the summed losses with respect to ``inputs``, same structure; None if not asked for.
    """

    names: tuple[str, ...]
    stacked: Tensor | None
    mode: str
    losses: Tensor
    input_grads: Tensor | tuple[Tensor, ...] | None = None

    @property
    def squared_norms(self) -> dict[str, Tensor]:
        """Squared norms ``[n]`` by parameter name."""
        return dict(zip(self.names, self.require_stacked().unbind(0), strict=True))

    @property
    def norms(self) -> Tensor:
        """``[n]``, norms over all parameters, of the graph the measurement ran on (not calibrated)."""
        return self.require_stacked().sum(0).sqrt()

    def require_stacked(self) -> Tensor:
        """``stacked``.

        Raises:
            ValueError: only input gradients were measured.
        """
        if self.stacked is None:
            raise ValueError("this measurement was taken with norms=False: it has input gradients only.")
        return self.stacked

    @property
    def input_norms(self) -> Tensor | None:
        """``[n]``, norms of the input gradients over everything but the example; None without ``inputs``."""
        return None if self.input_grads is None else input_norms(self.input_grads, self.losses.shape[0])

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.losses.shape[0]


def input_norms(gradients: Tensor | Sequence[Tensor], n: int) -> Tensor:
    """``[n]``, norm of each example's input gradient; views of an example and several inputs add up.

    Raises:
        ValueError: an input does not have its examples along the first dimension.
    """
    parts = [gradients] if isinstance(gradients, Tensor) else list(gradients)
    for part in parts:
        if part.dim() == 0 or part.shape[0] == 0 or part.shape[0] % n:
            raise ValueError(
                f"inputs must have the {n} examples along their first dimension, one of them has shape "
                f"{tuple(part.shape)}, so it has no gradient an example."
            )
    total: Tensor | float = 0.0
    for part in parts:
        squares = part.detach().to(accumulation_dtype(part)).square().reshape(-1, n, part[0].numel()).sum((0, 2))
        total = total + squares
    return torch.as_tensor(total).sqrt()


def as_wrapped(model: nn.Module) -> GradNormModule:
    """The wrapper behind ``model`` (itself, or inside ``DistributedDataParallel`` or ``torch.compile``).

    Raises:
        TypeError: nobody wrapped it.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    inside = model.__dict__.get("_modules", {}).get("_orig_mod")  # of torch.compile(model)
    if isinstance(inside, GradNormModule):
        model = inside
    if not isinstance(model, GradNormModule):
        raise TypeError(
            f"expected a model wrapped as engm.GradNormModule(net), got {type(model).__name__}: wrap it, and compute "
            "the losses with the wrapped model."
        )
    return model


def traced_losses(model: GradNormModule, losses: Tensor, *, check: bool | None = None) -> Trace:
    """The graph behind ``losses``, checked: it is this model's, captured, and (strict) all of it can be seen.

    Raises:
        TypeError, ValueError: see :func:`engm.exact.check_losses`.
        RuntimeError: no captured call of this model, or a strict check fails.
    """
    check_losses(losses, finite=check)
    trained = model.trainable_parameters()
    if not trained:
        raise ValueError("none of the model's parameters require grad, so there is no norm to take.")
    traced = trace(losses, trained)
    captures = traced.captures()
    if not any(capture.owner is model for capture in captures):
        if captures:
            raise RuntimeError("these losses belong to another GradNormModule: pass the model that computed them.")
        raise RuntimeError(
            "these losses were not computed by a captured forward pass of this model. Call the GradNormModule itself "
            "(not the network inside it), with gradients enabled, outside of model.paused()."
        )
    together = model.shard_group is not None  # in every backward pass: all ranks have to look alike
    structure = structure_of(traced, losses.shape[0], together)
    traced.plan = model.plans.get(structure)
    if traced.plan is None:
        traced.plan, sure = make_plan(model, traced, losses)
        if traced.tokens:
            check_sums(model, traced, losses)
        if together or (sure and bool(torch.isfinite(losses.detach()).all())):  # a NaN proves nothing: look again
            if len(model.plans) >= MOST_PLANS:
                del model.plans[next(iter(model.plans))]
            model.plans[structure] = traced.plan
    else:
        check_parameters(model, traced)  # of another step: they may have been replaced since
    return traced


def resolve_inputs(traced: Trace | None, inputs: Inputs) -> tuple[Tensor, ...]:
    """The tensors whose gradients stand for ``inputs``: themselves, or the leaf the wrapper put in their place.

    Raises:
        TypeError: not a tensor or a sequence of tensors.
        ValueError: one of them neither requires grad nor is an input that the wrapper replaced.
    """
    if inputs is None:
        return ()
    given = tuple(inputs) if isinstance(inputs, Sequence) else (inputs,)
    captures = [] if traced is None else traced.captures()
    seen = [pair for capture in captures for pair in capture.inputs]
    found = []
    for tensor in given:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"inputs must be a tensor or a tuple of tensors, got {type(tensor).__name__}.")
        leaf = tensor if tensor.requires_grad else next((leaf for ref, leaf in seen if ref() is tensor), None)
        if leaf is None:
            raise ValueError(
                "the gradient with respect to inputs is needed, but they do not require grad. Call "
                "inputs.requires_grad_() before the forward pass (N-ENGM and A-ENGM also accept the very tensor that "
                "the wrapped model was called with)."
            )
        found.append(leaf)
    return tuple(found)


def pack_input_grads(
    inputs: Inputs, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> Tensor | tuple[Tensor, ...] | None:
    """Gradients in the structure of ``inputs``; zero for one of several inputs that the losses do not depend on.

    Raises:
        ValueError: the losses depend on none of the inputs.
    """
    if inputs is None:
        return None
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            "the losses do not depend on inputs, so there is no gradient to read: pass the tensor that the model was "
            "called with (not a copy of it, nor one that was detached on the way)."
        )
    filled = tuple(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True))
    return filled[0] if isinstance(inputs, Tensor) else filled


def check_positive(name: str, value: float) -> float:
    """``value`` as a float.

    Raises:
        ValueError: it is not a positive finite number; names the argument.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = nan
    if not (isfinite(number) and number > 0):
        raise ValueError(f"{name} must be a positive and finite number, got {value!r}.")
    return number


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
    place of ``torch.autograd.grad(losses.sum(), inputs)`` and passes the result on to ``opt.backward``.

    Args:
        model: a :class:`GradNormModule`.
        losses: ``[n]``, one loss an example, from a forward pass of ``model``.
        inputs: tensor (or tuple) whose gradient is wanted from the same pass; must require grad.
        norms: ``False`` measures the input gradients alone: an ordinary backward pass to ``inputs``, which must require
            grad, through batch statistics, of losses that need not be captured (a forward pass under ``model.paused()``
            will do). It is what N-ENGM always reads, and A-ENGM between two regressions.
        loss_scale: factor on the losses inside the pass, divided out again (float16).
        check: look for non-finite losses; default on the CPU only, because elsewhere looking synchronises.

    Returns:
        A :class:`Measurement`. Where training-mode batch norm couples the examples its norms are of the graph with
        frozen statistics, not calibrated, and so are its input gradients (``batch_norm="exact"``: exact, and as slow
        as that is).

    Raises:
        TypeError, ValueError, RuntimeError: the losses are not such a vector, belong to another model, or a strict
            check fails; ``norms=False`` without inputs. Nothing is changed.
    """
    wrapped = as_wrapped(model)
    if not norms:
        return _measure_inputs(wrapped, losses, inputs, check_positive("loss_scale", loss_scale), check)
    traced = traced_losses(wrapped, losses, check=check)
    return measure_traced(wrapped, traced, losses, inputs, check_positive("loss_scale", loss_scale))


def _measure_inputs(
    model: GradNormModule, losses: Tensor, inputs: Inputs, loss_scale: float, check: bool | None
) -> Measurement:
    if inputs is None:
        raise ValueError("measure(norms=False) measures input gradients: pass inputs.")
    check_losses(losses, finite=check)
    leaves = resolve_inputs(None, inputs)
    gradients = input_gradients(losses, leaves, loss_scale)
    if loss_scale != 1.0:
        gradients = tuple(None if g is None else g / loss_scale for g in gradients)
    names = tuple(name for name, _ in model.trainable_parameters())
    return Measurement(names, None, "exact", losses.detach(), pack_input_grads(inputs, leaves, gradients))


def measure_traced(
    model: GradNormModule,
    traced: Trace,
    losses: Tensor,
    inputs: Inputs = None,
    loss_scale: float = 1.0,
    *,
    correct: bool = False,
) -> Measurement:
    """:func:`measure` for losses that were traced and checked; ``correct`` applies the local batch-norm correction."""
    leaves = resolve_inputs(traced, inputs)
    names = tuple(name for name, _ in traced.trained)
    mode = "plain"
    if traced.couples:
        mode = "exact" if model.batch_norm == "exact" else "corrected" if correct else "frozen"
    if mode in ("exact", "corrected"):
        _refuse_other_ranks(traced)
    if mode == "exact":
        stacked = exact_squared_norms(losses * loss_scale, [p for _, p in traced.trained])
        gradients = input_gradients(losses, leaves, loss_scale)
    else:
        session = Session(model, traced, losses.shape[0], correct=mode == "corrected")
        scales = torch.full_like(losses, loss_scale)
        gradients = session.run(losses, scales, leaves, frozen=traced.couples, retain_graph=True)
        stacked = session.squared_norms(losses)
    if loss_scale != 1.0:
        stacked = stacked / loss_scale**2
        gradients = tuple(None if g is None else g / loss_scale for g in gradients)
    return Measurement(names, stacked, mode, losses.detach(), pack_input_grads(inputs, leaves, gradients))


def input_gradients(losses: Tensor, leaves: Sequence[Tensor], loss_scale: float = 1.0) -> tuple[Tensor | None, ...]:
    """Gradients of the summed losses (times ``loss_scale``) with respect to ``leaves``; the graph is kept."""
    if not leaves:
        return ()
    return torch.autograd.grad(
        losses, list(leaves), torch.full_like(losses, loss_scale), retain_graph=True, allow_unused=True
    )


def calibrated_squared_norms(
    model: GradNormModule,
    traced: Trace,
    losses: Tensor,
    measurement: Measurement,
    *,
    borrowed: bool,
    count: bool,
    loss_scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """``([L, n] squared norms, [L] factors)`` of a measurement, as norms of the training graph behind ``losses``.

    The factors are None where none are called for: nothing couples the examples, or the model asks for raw or exact
    norms. Those of a training step (``count``) under ``DistributedDataParallel`` are taken by all ranks together, which
    all have to call this then; without ``count`` nothing is sent. Under ``fully_shard`` all ranks always have to.

    Raises:
        ValueError: an exact norm is asked for and the measurement is of another graph.
    """
    stacked = measurement.require_stacked()
    if not traced.couples or model.batch_norm == "frozen" or measurement.mode == "exact":
        return stacked, None
    if model.batch_norm == "exact":
        raise ValueError(
            "batch_norm='exact' takes norms through the statistics of the training graph; a measurement of another "
            "graph cannot give them. Leave measurement out, or wrap with batch_norm='calibrated'."
        )
    _refuse_other_ranks(traced)
    mode = f"{measurement.mode}, {'borrowed' if borrowed else 'own pass'}"
    factors = model.calibration.factors(
        mode,
        stacked,
        losses,
        traced.trained,
        count=count,
        loss_scale=loss_scale,
        group=group_of(model, traced.captures()) if count or model.shard_group is not None else None,
        in_step=model.shard_group is not None,
    )
    return stacked, factors


def _refuse_other_ranks(traced: Trace) -> None:
    """Exact gradients of a few examples cannot be taken where the examples of several processes are one batch.

    Raises:
        RuntimeError: ``nn.SyncBatchNorm`` over several processes.
    """
    if traced.require_plan().of_all_ranks:
        raise RuntimeError(
            "engm: nn.SyncBatchNorm over several processes couples the examples of all of them, and the exact "
            "gradients that calibration takes of a few would be mixed with those of other processes. Wrap with "
            "GradNormModule(net, batch_norm='frozen'), or leave nn.BatchNorm in place."
        )


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
    scale = check_positive("loss_scale", loss_scale)
    traced = traced_losses(wrapped, losses, check=check)
    measurement = measure_traced(wrapped, traced, losses, None, scale, correct=wrapped.batch_norm == "calibrated")
    stacked, factors = calibrated_squared_norms(
        wrapped, traced, losses, measurement, borrowed=False, count=False, loss_scale=scale
    )
    if factors is not None:
        stacked = stacked * factors.unsqueeze(1)
    return stacked.sum(0).sqrt()
