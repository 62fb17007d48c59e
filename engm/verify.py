"""Whether the engine is right on a user's own model and batch: its norms against one backpropagation an example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .backward.norms import calibrated_squared_norms, lent_mode, mapped_norms, measure_graph, own_mode
from .backward.prepare import planned_losses
from .capture.layers import untouched
from .exact import exact_squared_norms
from .graph.plan import PlanCache, PlannedGraph
from .loss_checks import check_losses
from .module import GradNormModule, as_wrapped
from .torch_internals import node_outputs, operator_name

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
SMALL_LAYER = 1e-2  # a layer's error is measured against no less than this share of the example's whole norm


@dataclass(frozen=True)
class LayerError:
    """How far the engine's norms of one parameter tensor are from the oracle's.

    Attributes:
        name: the parameter's name in the network.
        rule: the rule of the layer that used the parameter, or the operator by which it enters the batch's computation.
        error: the largest error of the tensor's per-example norms, relative to the norm itself, or to 1 % of the
            example's whole norm where that is larger (a bias in front of a batch norm has gradient 0, and nothing but
            rounding for a norm).
    """

    name: str
    rule: str
    error: float


@dataclass(frozen=True)
class VerifyReport:
    """Outcome of :func:`verify`; prints as a table.

    Attributes:
        layers: one entry a parameter tensor.
        error: largest relative error of the whole norms against the oracle. Where batch norm couples the examples,
            engine and oracle both hold its statistics constant; with ``batch_norm="exact"`` the engine itself computes
            what the oracle does.
        tolerance: what ``error`` and every layer's error must not exceed.
        couples: whether batch norm couples the examples.
        calibrated_error: mean relative error of the calibrated norms against exact ones through the statistics; None
            where nothing couples.
        passed: whether all errors are within tolerance.
    """

    layers: tuple[LayerError, ...]
    error: float
    tolerance: float
    couples: bool
    calibrated_error: float | None

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance and all(layer.error <= self.tolerance for layer in self.layers)

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [9])
        lines = [f"{'parameter':{width}}  {'rule':18}  error"]
        for layer in self.layers:
            mark = "" if layer.error <= self.tolerance else "  <-- beyond tolerance"
            lines.append(f"{layer.name:{width}}  {layer.rule:18}  {layer.error:.1e}{mark}")
        oracle = "the oracle with frozen batch statistics" if self.calibrated_error is not None else "the oracle"
        verdict = "passed" if self.passed else "FAILED"
        lines.append(f"whole norms against {oracle}: {self.error:.1e} (tolerance {self.tolerance:.0e}): {verdict}")
        if self.calibrated_error is not None:
            lines.append(
                f"calibrated norms against exact ones through the statistics: {self.calibrated_error:.2%} mean error"
            )
        return "\n".join(lines)


def verify(
    model: nn.Module, loss_fn: Callable[..., Tensor], batch: Any, *, raise_on_error: bool = False
) -> VerifyReport:
    """Compares the engine's per-example norms with one backpropagation an example, parameter by parameter.

    Use a small batch; cast model and batch to float64 to see the mathematics rather than the rounding. Gradients,
    buffers, random state and calibration are left as they were.

    Args:
        model: a :class:`GradNormModule`.
        loss_fn: ``loss_fn(model, batch)``, or ``loss_fn(model, *batch)``, or ``loss_fn(outputs, targets)`` for a
            ``batch = (inputs, targets)``; returns ``[n]``, one loss an example.
        batch: what ``loss_fn`` takes.
        raise_on_error: whether to raise instead of returning a report that did not pass.

    Returns:
        A :class:`VerifyReport`.

    Raises:
        TypeError, ValueError, RuntimeError: what :func:`engm.measure` raises; TypeError if ``loss_fn`` is no function;
            and RuntimeError with the report if
            ``raise_on_error`` is set and the report did not pass.
    """
    wrapped = as_wrapped(model)
    calibration = wrapped.calibration.state_dict()
    plans = PlanCache(wrapped.engm_plans)
    try:
        with untouched(wrapped.unwrap()), torch.enable_grad():
            losses = _losses(wrapped, loss_fn, batch)
            report = _compare(wrapped, planned_losses(wrapped, losses, check=True, watch=False), losses)
    finally:
        wrapped.calibration.load_state_dict(calibration)
        wrapped.engm_plans = plans
    if raise_on_error and not report.passed:
        raise RuntimeError(f"engm.verify: the engine does not agree with the oracle.\n{report}")
    return report


def _losses(model: GradNormModule, loss_fn: Callable[..., Tensor], batch: Any) -> Tensor:
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn must be a function of (model, batch), or of (outputs, targets), that returns one loss per "
            f"example, got {type(loss_fn).__name__}: engm.verify(model, nn.CrossEntropyLoss(reduction='none'), (x, y))."
        )
    several = isinstance(batch, Sequence) and not isinstance(batch, str | Tensor)
    if several and len(batch) > 1 and _positional(loss_fn) == 1 + len(batch):
        losses = loss_fn(model, *batch)
    elif not several or len(batch) != 2:
        losses = loss_fn(model, batch)
    elif isinstance(loss_fn, nn.Module) or getattr(loss_fn, "__module__", "").startswith("torch"):
        losses = loss_fn(model(batch[0]), batch[1])
    else:
        try:
            losses = loss_fn(model, batch)
        except (TypeError, AttributeError) as error:  # perhaps loss_fn takes (outputs, targets)
            try:
                losses = loss_fn(model(batch[0]), batch[1])
            except (TypeError, AttributeError):
                raise error from None
    check_losses(losses)
    return losses


def _positional(function: Callable[..., Any]) -> int | None:
    """Number of positional parameters without a default, or None where Python cannot tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def _compare(model: GradNormModule, graph: PlannedGraph, losses: Tensor) -> VerifyReport:
    names, parameters = graph.names, graph.parameters
    mode = lent_mode(model, graph)
    raw = measure_graph(graph, losses, mode).require_stacked()
    calibrated_error = None
    if mode == "frozen":
        with graph.frozen_statistics():
            oracle = exact_squared_norms(losses, parameters)
        exact = exact_squared_norms(losses, parameters).sum(0).sqrt()
        measurement = measure_graph(graph, losses, own_mode(model, graph))
        mapped = mapped_norms(*calibrated_squared_norms(model, graph, losses, measurement, borrowed=False, count=False))
        calibrated_error = float(((mapped - exact).abs() / exact.clamp_min(torch.finfo(exact.dtype).tiny)).mean())
    else:
        oracle = exact_squared_norms(losses, parameters)
    whole = oracle.sum(0).sqrt()
    floor = (SMALL_LAYER * whole).clamp_min(torch.finfo(whole.dtype).tiny)
    layer_errors = (raw.sqrt() - oracle.sqrt()).abs() / torch.maximum(oracle.sqrt(), floor)
    errors = layer_errors.nan_to_num(nan=torch.inf).amax(1).tolist()
    rules = _rules(graph, by_definition=mode == "exact")
    layers = tuple(
        LayerError(name, rules.get(id(p), "not reached"), error)
        for name, p, error in zip(names, parameters, errors, strict=True)
    )
    total = ((raw.sum(0).sqrt() - whole).abs() / whole.clamp_min(torch.finfo(whole.dtype).tiny)).nan_to_num(
        nan=torch.inf
    )
    return VerifyReport(layers, float(total.max()), _tolerance(graph), graph.couples, calibrated_error)


def _tolerance(graph: PlannedGraph) -> float:
    """The tolerance of the narrowest dtype among parameters and results; autocast and mixed models have several."""
    dtypes = {parameter.dtype for parameter in graph.parameters}
    dtypes.update(output.dtype for node in graph.trace.order for output in node_outputs(node))
    return max(TOLERANCE.get(dtype, 0.0) for dtype in dtypes)


def _rules(graph: PlannedGraph, *, by_definition: bool) -> dict[int, str]:
    """By id of a parameter, the rule of the layer that used it, or the operator by which it enters."""
    plan = graph.plan
    found: dict[int, str] = {}
    for call, layout in zip(graph.trace.calls, plan.layouts, strict=True):
        if layout is not None:
            name = "by definition" if by_definition else type(call.rule).__name__
            found.update((id(parameter), name) for parameter in call.parameters.values())
    for entry in plan.entries:
        operator = operator_name(graph.trace.order[entry.position])
        for source in entry.sources:
            found.setdefault(source.parameter, "by definition" if by_definition else f"operator {operator}")
    return found
