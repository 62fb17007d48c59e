"""Which rows of the tensors on the way some of the losses reach, seen from a backward pass of these losses alone.

A layout says in which rows of a tensor every example lies. A layout that gives a gradient to an example whose loss was
left out is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..capture.calls import Call
from ..terms.layout import Layout
from .node_kinds import Structure
from .trace import Trace


class Look:
    """A backward pass of some of the losses, which strikes out the layouts that do not agree with its gradients.

    Args:
        traced: the graph.
        losses: ``[n]``.
        active: ``[n]``, which of the losses are backpropagated.
        structure: the kinds and possible layouts of the graph's nodes.
        watched: positions of nodes to look at beside the calls.
        sinks: where the pass ends; default: behind all calls and watched nodes.

    Attributes:
        calls: by number of the call, its layouts in which examples without a loss have no gradient.
        nodes: by position of a watched node, its layouts in which examples without a loss have no gradient.
        touched_calls: numbers of the calls that received a gradient other than zero.
        touched: positions of the watched nodes that received a gradient other than zero.
    """

    def __init__(
        self,
        traced: Trace,
        losses: Tensor,
        active: Tensor,
        structure: Structure,
        watched: Sequence[int],
        sinks: Sequence[GradientEdge] | None = None,
    ) -> None:
        self.traced, self.losses, self.active = traced, losses, active
        self.calls = {number: list(possible) for number, possible in enumerate(structure.choices.calls)}
        self.nodes = {position: list(structure.layouts(position)) for position in watched}
        self.touched_calls: set[int] = set()
        self.touched: set[int] = set()
        self._numbers = {id(call): number for number, call in enumerate(traced.calls)}
        self._couplings = structure.couplings()
        self._sinks = [traced.edge(*sink) for sink in structure.sinks(watched)] if sinks is None else list(sinks)

    def run(self) -> None:
        """Backpropagates the active losses and strikes out layouts."""
        edges = [GradientEdge(self.traced.order[position], 0) for position in self.nodes]
        if not edges and not self._sinks:
            return
        with self.traced.collecting(self), self.traced.frozen_statistics(self._couplings):
            found = torch.autograd.grad(
                self.losses,
                [*edges, *self._sinks],
                self.active.to(self.losses.dtype),
                retain_graph=True,
                allow_unused=True,
            )
        for position, gradient in zip(self.nodes, found, strict=False):
            if gradient is not None and self._keep(self.nodes[position], gradient):
                self.touched.add(position)

    def again(self, active: Tensor) -> None:
        """Backpropagates other losses, and strikes out the layouts that do not agree with them either."""
        self.active = active
        self.run()

    def open(self) -> bool:
        """Whether some call or watched node has several layouts left."""
        return any(len(possible) > 1 for possible in (*self.calls.values(), *self.nodes.values()))

    def holds(self, call: Call) -> bool:
        """No: gradients are looked at and let go."""
        return False

    def receive(self, call: Call, backprops: Any) -> None:
        """Looks at the gradient of a call's output, which a capture hands over."""
        number = self._numbers.get(id(call))
        if number is None:
            return
        for gradient in call.by_example(backprops):
            if self._keep(self.calls[number], gradient):
                self.touched_calls.add(number)

    def _keep(self, possible: list[Layout], gradient: Tensor) -> bool:
        """Strikes out the layouts that do not agree with a gradient; returns whether any of it is not zero."""
        if not bool(_given(gradient).any()):
            return False
        for layout in list(possible):
            if not _keeps_apart(layout, gradient, self.active):
                possible.remove(layout)
        return True


def _given(gradient: Tensor) -> Tensor:
    """Where a gradient is not zero; a NaN counts as zero, because it may be 0 times a NaN or an infinity."""
    return (gradient != 0) & ~gradient.isnan()


def _keeps_apart(layout: Layout, gradient: Tensor, active: Tensor) -> bool:
    """Whether, in this layout, the rows of examples without a loss have no gradient."""
    n = active.shape[0]
    rows = layout.examples_first(_given(gradient), n).reshape(n, -1).any(1)
    return not bool(rows[~active].any())
