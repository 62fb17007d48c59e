"""A check of what cannot be read from the graph: do the per-example gradients add up to the gradient?

Inside a region made by ``torch.compile`` a parameter may be used beside the layer calls that were tapped
(``F.linear(x, layer.weight)``, a layer that the compiler saw twice), and the graph does not show it. But the region
computes the gradient of its parameters in any case, so the two can be compared. It is done once for every structure.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..graph.plan import PlannedGraph
from .collect import TermCollector

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}  # of a gradient, as a share of the norms that add up to it
NARROW_TOLERANCE = 5e-2  # the same for narrower types


def check_sums(graph: PlannedGraph, losses: Tensor) -> None:
    """Compare sums of per-example gradients with gradients, for the parameters of compiled regions.

    Raises:
        RuntimeError: names the parameters that disagree, and says what to do.
    """
    traced, n = graph.trace, graph.n
    inside = {
        id(p)
        for call, node in zip(traced.calls, traced.nodes, strict=True)
        if node in traced.tokens
        for p in call.parameters.values()
    }
    named = [(name, p) for name, p in traced.trained if id(p) in inside]
    if not named:
        return
    collector = TermCollector(graph, keep=True)
    signs = 1.0 - 2.0 * torch.randint(2, (n,), generator=torch.Generator().manual_seed(n), device="cpu")
    weights = signs.to(losses)
    gradients = collector.run(losses, weights, [p for _, p in named], retain_graph=True)
    sizes = collector.squared_norms(losses).sqrt().sum(1)
    sums = {id(p): total for p, total in collector.weighted_sums(torch.ones_like(weights), {id(p) for _, p in named})}
    wrong = []
    for (name, parameter), gradient in zip(named, gradients, strict=True):
        total = sums.get(id(parameter))
        found = torch.zeros_like(parameter) if total is None else total
        expected = torch.zeros_like(parameter) if gradient is None else gradient
        error = (found.double() - expected.double()).norm()
        size = torch.maximum(sizes[collector.rows[id(parameter)]].double(), expected.double().norm())
        if bool(torch.isfinite(size)) and float(error) > TOLERANCE.get(parameter.dtype, NARROW_TOLERANCE) * float(size):
            wrong.append(name)
    if wrong:
        shown = ", ".join(f"'{name}'" for name in wrong[:5])
        raise RuntimeError(
            f"engm: inside a region made by torch.compile {shown} are used in more ways than by calls of their layers, "
            "so a part of their per-example gradients cannot be seen. Call the layer itself instead of computing with "
            "what is inside it, leave that part uncompiled with torch.compiler.disable, or freeze the parameter."
        )
