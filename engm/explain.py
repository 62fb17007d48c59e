"""What the engine will do with a network before anything is trained: by which rule, form and cost each norm is found.

The network is run once on a batch. Every layer's rule is asked for the cost at the shapes that are seen, and the graph
of the outputs tells which parameters enter outside of layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .capture.layers import untouched
from .cost.table import describe, device_text
from .graph.plan import Plan
from .graph.planning import make_plan
from .graph.trace import Trace, trace
from .module import GradNormModule, layers_to_capture
from .rules import Rule
from .rules.any_operator import runs_once
from .terms.owners import Owners, Ownership
from .torch_internals import operator_name, tree_leaves

ROUTING = {
    "fixed": "the same for every batch of these shapes",
    "compared": "moved by indices, orders or masks that are compared at every step, and measured where they differ",
    "unknown": "not known, as there is no loss of these outputs",
    "measured": "kept apart by zeros in the data alone, so they are measured at every step",
}


@dataclass(frozen=True)
class LayerCost:
    """One call of one layer, or a parameter that is used outside of such calls.

    Attributes:
        name: the module's or the parameter's name in the network.
        kind: the module's type; of a parameter the operator by which it enters the batch's computation.
        rule: the rule's name, or ``"-"``; for a parameter ``"operator"``, or ``"operator, run again"`` where the
            operator's own backward pass is run once more, or ``"operator, once an example"`` where it is for every one.
        form: ``"direct"``, ``"gram"``, ``"sum"``, or ``"-"`` if the layer is not supported; for a parameter ``"sum"``,
            or ``"pulled back"`` if what enters is computed from the parameter, and autograd computes the parameter's
            gradient from it for every example.
        flops: of the norm, for one example, in the chosen form.
        direct_flops: of the norm, for one example, in the direct form.
        gram_flops: of the norm, for one example, in the Gram form.
        bytes: operands read for one example.
        couples: whether the layer takes statistics from the batch in its present mode.
        problem: why the layer is not supported, or empty.
        rows: how the examples' rows lie in the output: ``"n"`` (along the first dimension, one after the other),
            ``"n x 4"`` (four rows of one example side by side), ``"2 x n"`` (the batch twice), ``"[:, n]"`` (along
            the second dimension), ``"any order"`` (each row's owner was measured, and rows are taken by it),
            ``"shared"`` (the layer computes something for all examples); empty where no gradient comes to.
    """

    name: str
    kind: str
    rule: str
    form: str
    flops: int = 0
    direct_flops: int = 0
    gram_flops: int = 0
    bytes: int = 0
    couples: bool = False
    problem: str = ""
    rows: str = ""


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; prints as a table.

    Attributes:
        layers: one :class:`LayerCost` a call, in the order of the forward pass; then the parameters that enter outside
            of layer calls.
        batch_norm: which norms the engine gives where batch norms couple the examples, as in :class:`GradNormModule`.
        cost_table: what the forms are chosen by: ``"built-in"`` or a file of :func:`engm.tune`, and the device.
        routing: how long what was measured of the rows holds: ``"fixed"`` (for every batch of these shapes),
            ``"compared"`` (as long as indices, orders or masks that move rows are the same, which is compared at every
            step), ``"measured"`` (examples are kept apart by zeros in the data alone: measured at every step),
            ``"unknown"`` (the network is refused, or its outputs do not tell how many examples there are).
        coupled: whether examples influence each other's losses otherwise than by a batch norm over the whole batch,
            which ``GradNormModule(net, coupled="exact")`` allows.
    """

    layers: tuple[LayerCost, ...]
    batch_norm: str
    cost_table: str = "built-in (cpu)"
    routing: str = "unknown"
    coupled: bool = False

    @property
    def supported(self) -> bool:
        """Whether every layer with trained parameters has a rule."""
        return not any(layer.problem for layer in self.layers)

    @property
    def couples(self) -> bool:
        """Whether any layer makes one example's output depend on the others."""
        return any(layer.couples for layer in self.layers)

    @property
    def flops(self) -> int:
        """Floating point operations of all norms, for one example."""
        return sum(layer.flops for layer in self.layers)

    def __str__(self) -> str:
        header = ("layer", "type", "rule", "form", "MFLOP", "kB", "rows", "")
        rows = [
            (
                layer.name or "(net)",
                layer.kind,
                layer.rule,
                layer.form,
                f"{layer.flops / 1e6:.3f}",
                f"{layer.bytes / 1e3:.1f}",
                layer.rows,
                layer.problem or ("couples the batch" if layer.couples else ""),
            )
            for layer in self.layers
        ]
        widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
        lines = [f"forms are chosen by the cost table: {self.cost_table}"]
        lines += [
            "  ".join(
                cell.rjust(w) if k in (4, 5) else cell.ljust(w)
                for k, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in [header, tuple("-" * w for w in widths), *rows]
        ]
        if not self.supported:
            verdict = "not supported as it is, for the reasons above"
        elif self.coupled:
            verdict = (
                "examples influence each other: exact, and as slow as one backpropagation an example from there on"
            )
        elif self.couples:
            verdict = (
                f"batch norm couples the examples: norms are {self.batch_norm}, the update is a second backward pass"
            )
        else:
            verdict = "nothing couples the examples: norms and update are exact, in one pass"
        lines.append(f"norms: {self.flops / 1e6:.1f} MFLOP an example; {verdict}")
        lines.append(f"rows: {ROUTING[self.routing]}")
        return "\n".join(line.rstrip() for line in lines)


def explain(model: nn.Module, x: Any) -> Explanation:
    """Runs ``model`` once on ``x`` and tells, layer by layer, by which rule and in which form the norm will be found.

    Parameters that no layer call accounts for (a class token, a layer scale, the projections of
    ``nn.MultiheadAttention``, a weight under ``weight_norm``) are listed after the layers, each with the operator by
    which it enters.

    Args:
        model: a network or a :class:`GradNormModule`; mode, buffers and random state are left as they were.
        x: the input batch, examples along the first dimension; a tuple is passed as positional, a dict as keyword
            arguments.

    Returns:
        An :class:`Explanation`, which prints as a table.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain expects a torch.nn.Module, got {type(model).__name__}.")
    net = model.unwrap() if isinstance(model, GradNormModule) else model
    layers: list[LayerCost] = []
    routing, coupled_there = "unknown", False
    handles = []
    devices: set[str] = set()
    try:
        for name, module, rule in layers_to_capture(net):

            def record(
                module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name, rule: Rule = rule
            ) -> None:
                layers.append(_cost_of_call(name, module, rule, args, kwargs, output))
                devices.update(device_text(o.device) for o in tree_leaves(output) if isinstance(o, Tensor))

            trained = any(p.requires_grad for p in module.parameters(recurse=False))
            if not rule.generic and (trained or rule.couples(module)):
                handles.append(module.register_forward_hook(record, with_kwargs=True))
        coupled = model.coupled if isinstance(model, GradNormModule) else "refuse"
        wrapped = GradNormModule(net, strict=False, coupled=coupled)
        with torch.enable_grad(), untouched(net):
            outputs = wrapped(**x) if isinstance(x, dict) else wrapped(*x) if isinstance(x, tuple) else wrapped(x)
            traced, plan, problem = _planned(wrapped, outputs, x)
        if problem:
            layers.append(LayerCost("", type(net).__name__, "-", "-", problem=problem))
        if plan is not None:
            layers = _with_rows(layers, traced, plan) + _costs_outside_of_layers(traced, plan)
            coupled_there = plan.coupled
            routing = "measured" if not plan.keeps else "compared" if plan.routes else "fixed"
    finally:
        for handle in handles:
            handle.remove()
    batch_norm = model.batch_norm if isinstance(model, GradNormModule) else "calibrated"
    return Explanation(tuple(layers), batch_norm, describe(devices), routing, coupled_there)


def _planned(model: GradNormModule, outputs: Any, x: Any) -> tuple[Trace, Plan | None, str]:
    """The graph of a loss of the outputs and its plan; or why there is none."""
    inputs = [value for value in tree_leaves(x) if isinstance(value, Tensor) and value.dim()]
    found = [o for o in tree_leaves(outputs) if isinstance(o, Tensor) and o.grad_fn is not None and inputs]
    n = inputs[0].shape[0] if inputs else 0
    rows = [o.movedim(dim, 0) for o in found if (dim := _dimension_of(o, n)) is not None]
    if not rows:
        return Trace(), None, ""
    losses = torch.stack([o.reshape(-1, n, o[0].numel()).sum((0, 2)) for o in rows]).sum(0)
    traced = trace(losses, model, model.trainable_parameters())
    try:
        return traced, make_plan(model, traced, losses), ""
    except RuntimeError as error:
        return traced, None, str(error)


def _dimension_of(output: Tensor, n: int) -> int | None:
    """The dimension of an output that the examples probably lie along."""
    return next((d for d in range(min(2, output.dim())) if output.shape[d] and output.shape[d] % n == 0), None)


def _with_rows(layers: list[LayerCost], traced: Trace, plan: Plan) -> list[LayerCost]:
    """The layers with the order that their rows lie in; ``layers`` are in the order of the forward pass."""
    orders: dict[str, list[str]] = {}
    for call, layout in zip(reversed(traced.calls), reversed(plan.layouts), strict=True):
        orders.setdefault(call.name, []).append("shared" if layout is None else _described(layout))
    found = []
    for layer in layers:
        waiting = orders.get(layer.name, [])
        found.append(replace(layer, rows=waiting.pop(0) if waiting else ""))
    return found


def _described(layout: Ownership) -> str:
    if isinstance(layout, Owners):
        return "any order"
    outer, inner = f"{layout.outer} x " if layout.outer > 1 else "", f" x {layout.inner}" if layout.inner > 1 else ""
    return f"[:, {outer}n{inner}]" if layout.dim else f"{outer}n{inner}"


def _costs_outside_of_layers(traced: Trace, plan: Plan) -> list[LayerCost]:
    """Modules that are run again, and parameters that enter outside of layer calls."""
    names = {id(parameter): name for name, parameter in traced.trained}
    costs = [
        LayerCost(call.name, type(call.module).__name__, "module run again", "sum")
        for call, layout in zip(traced.calls, plan.layouts, strict=True)
        if call.rule.generic and layout is not None
    ]
    for entry in plan.entries:
        kind = operator_name(traced.order[entry.position])
        again = "run again" if runs_once(entry.at(traced, traced.n)) else "once an example"
        rule = "operator" if entry.ruled else f"operator, {again}"
        for source in entry.sources:
            form = "sum" if source.rearranged else "pulled back"
            costs.append(LayerCost(names[source.parameter], kind, rule, form, rows=_described(entry.layout)))
    return costs


def _channels_last(x: Tensor) -> bool:
    """Whether the channels of a map lie side by side in memory, as the operators ask (csrc/checks.cpp)."""
    return x.dim() > 2 and x.shape[1] > 1 and x.stride(1) == 1 and x.stride(-1) != 1


def _cost_of_call(name: str, module: nn.Module, rule: Rule, args: Any, kwargs: Any, output: Any) -> LayerCost:
    """What a layer's norm costs at the shapes of one call, or why the call is not supported."""
    kind = type(module).__name__
    taken = [value for value in tree_leaves(rule.activations(args, kwargs)) if isinstance(value, Tensor)]
    given = [value for value in tree_leaves(output) if isinstance(value, Tensor)]
    if not taken or not given or not (rule.whole_call or isinstance(output, Tensor)):
        return LayerCost(name, kind, type(rule).__name__, "-", problem="it must take and return one tensor")
    cost = rule.cost(
        module,
        tuple(taken[0].shape),
        tuple(given[0].shape),
        given[0].device,
        given[0].dtype,
        _channels_last(taken[0]),
    )
    return LayerCost(
        name,
        kind,
        type(rule).__name__,
        cost.form,
        cost.flops,
        cost.direct_flops,
        cost.gram_flops,
        cost.bytes,
        rule.couples(module),
    )
