"""What the engine will do with a network, layer by layer, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .cost_table import describe, device_text
from .module import GradNormModule
from .rules import Rule, find_rule


@dataclass(frozen=True)
class LayerPlan:
    """One call of one layer.

    Attributes:
        name: the module's name in the network.
        kind: its type.
        rule: the rule's name, or ``"-"``.
        form: ``"direct"``, ``"gram"``, ``"sum"``, or ``"-"`` if the layer is not supported.
        flops: of the norm, for one example, in the chosen form.
        direct_flops: in the direct form.
        gram_flops: in the Gram form.
        bytes: operands read for one example.
        couples: whether the layer takes statistics from the batch in its present mode.
        problem: why the layer is not supported, or empty.
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


@dataclass(frozen=True)
class Explanation:
    """The plan for a network; prints as a table.

    Attributes:
        layers: one :class:`LayerPlan` a call, in the order of the forward pass.
        batch_norm: what norms mean where batch norms couple the examples.
        cost_table: what the forms are chosen by: ``"built-in"`` or a file of :func:`engm.tune`, and the device.
    """

    layers: tuple[LayerPlan, ...]
    batch_norm: str
    cost_table: str = "built-in (cpu)"

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
        """Of all norms, for one example."""
        return sum(layer.flops for layer in self.layers)

    def __str__(self) -> str:
        header = ("layer", "type", "rule", "form", "MFLOP", "kB", "")
        rows = [
            (
                layer.name or "(net)",
                layer.kind,
                layer.rule,
                layer.form,
                f"{layer.flops / 1e6:.3f}",
                f"{layer.bytes / 1e3:.1f}",
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
            verdict = "not supported: freeze the layers marked above, or give them rules with engm.register_rule"
        elif self.couples:
            verdict = (
                f"batch norm couples the examples: norms are {self.batch_norm}, the update is a second backward pass"
            )
        else:
            verdict = "nothing couples the examples: norms and update are exact, in one pass"
        lines.append(f"norms: {self.flops / 1e6:.1f} MFLOP an example; {verdict}")
        return "\n".join(line.rstrip() for line in lines)


def explain(model: nn.Module, x: Any) -> Explanation:
    """Runs ``model`` once on ``x`` without gradients and tells, per layer, which rule and form its norm will take.

    Args:
        model: a network or a :class:`GradNormModule`; unlike the wrapper, a plain network may hold layers without a
            rule, which are then listed with the reason. Mode, buffers and random state are left as they were.
        x: the input batch; a tuple is passed as positional, a dict as keyword arguments.

    Returns:
        An :class:`Explanation`; ``print`` it.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain expects a torch.nn.Module, got {type(model).__name__}.")
    net = model.unwrap() if isinstance(model, GradNormModule) else model
    plans: list[LayerPlan] = []
    handles = []
    called = set()
    devices: set[str] = set()
    try:
        for name, module in net.named_modules():
            rule = find_rule(module)
            trained = [p for p in module._parameters.values() if p is not None and p.requires_grad]
            if not trained and (isinstance(rule, str) or not rule.couples(module)):
                continue

            def record(
                module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name, rule: Rule | str = rule
            ) -> None:
                called.add(name)
                plans.append(_plan(name, module, rule, args, kwargs, output))
                if isinstance(output, Tensor):
                    devices.add(device_text(output.device))

            handles.append(module.register_forward_hook(record, with_kwargs=True))
            if isinstance(rule, str):
                called.add(name)
                plans.append(LayerPlan(name, type(module).__name__, "-", "-", problem=rule))
                handles.pop().remove()
        with torch.no_grad(), untouched(net):
            if isinstance(x, dict):
                net(**x)
            else:
                net(*x) if isinstance(x, tuple) else net(x)
    finally:
        for handle in handles:
            handle.remove()
    batch_norm = model.batch_norm if isinstance(model, GradNormModule) else "calibrated"
    return Explanation(tuple(plans), batch_norm, describe(devices))


def _plan(name: str, module: nn.Module, rule: Rule | str, args: Any, kwargs: Any, output: Any) -> LayerPlan:
    kind = type(module).__name__
    if isinstance(rule, str):
        return LayerPlan(name, kind, "-", "-", problem=rule)
    activations = rule.activations(args, kwargs)
    if not isinstance(activations, Tensor) or not isinstance(output, Tensor):
        return LayerPlan(name, kind, type(rule).__name__, "-", problem="it must take and return one tensor")
    cost = rule.cost(module, tuple(activations.shape), tuple(output.shape), output.device, output.dtype)
    return LayerPlan(
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


@contextmanager
def untouched(net: nn.Module) -> Iterator[None]:
    """Restores the network's buffers and the random state when the context ends."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in net.buffers()]
    devices = sorted({p.device.index for p in net.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
