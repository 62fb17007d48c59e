"""Reading an autograd graph: which captured calls a loss reaches, in which order, and through which leaves.

Captured calls are found here and nowhere else. A call is written into the metadata of the autograd node of its
output, so it lives exactly as long as the graph it belongs to, whatever else the user does with the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .capture import CALLS_KEY, CAPTURES_KEY, Call, Capture
from .compiled import NODE_NAME as COMPILED_NODE
from .compiled import attach, keep, segment_of

if TYPE_CHECKING:
    from .plan import Plan

Node = Any  # torch.autograd.graph.Node; C++ nodes do not subclass it


@dataclass
class Trace:
    """What :func:`trace` found behind a loss.

    Attributes:
        order: all nodes but those of leaves, each after the nodes that it passes gradients to; the losses' is the last.
        positions: the index in ``order`` of every node.
        calls: captured calls, those nearest to the losses first.
        nodes: the node of each call, in the same order.
        marked: forward passes whose outputs were met.
        leaves: every leaf (by ``id``), in the order they were met.
        tokens: by compiled region, the leaf that a backward pass must go to for it to run (:mod:`engm.compiled`).
        trained: names and tensors of the parameters that norms are taken over.
        plan: how the examples lie in it, once :mod:`engm.strict` has looked.
    """

    order: list[Node] = field(default_factory=list)
    positions: dict[Node, int] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    marked: list[Capture] = field(default_factory=list)
    leaves: dict[int, Tensor] = field(default_factory=dict)
    tokens: dict[Node, Tensor] = field(default_factory=dict)
    trained: Sequence[tuple[str, nn.Parameter]] = ()
    plan: Plan | None = None

    @property
    def couples(self) -> bool:
        """Whether some batch norm on the way takes its statistics from the batch."""
        return any(call.couples for call in self.calls) or (self.plan is not None and bool(self.plan.couplings))

    def captures(self) -> list[Capture]:
        """The captured forward passes behind the losses."""
        return list({id(c): c for c in (*self.marked, *(call.capture for call in self.calls))}.values())

    def edge(self, position: int, number: int) -> GradientEdge:
        """What to differentiate with respect to for a backward pass to reach an output of a node."""
        token = self.tokens.get(self.order[position])
        return GradientEdge(self.order[position], number) if token is None else get_gradient_edge(token)

    def require_plan(self) -> Plan:
        """The plan.

        Raises:
            RuntimeError: nobody made one.
        """
        if self.plan is None:
            raise RuntimeError("engm: this graph was not planned: it is no graph of a captured forward pass.")
        return self.plan


def trace(losses: Tensor, trained: Sequence[tuple[str, nn.Parameter]] = ()) -> Trace:
    """Walk the graph behind ``losses`` once, depth first, without touching it; ``trained`` goes into the result."""
    result = Trace(trained=trained)
    root = losses.grad_fn
    if root is None:
        return result
    seen = {root}
    stack: list[tuple[Node, Iterator[Node]]] = [(root, iter(_next_nodes(root, result)))]
    while stack:
        node, children = stack[-1]
        for child in children:
            if child not in seen:
                seen.add(child)
                stack.append((child, iter(_next_nodes(child, result))))
                break
        else:
            stack.pop()
            result.positions[node] = len(result.order)
            result.order.append(node)
    for node in reversed(result.order):
        metadata = node.metadata
        for call in metadata.get(CALLS_KEY, ()):
            result.calls.append(call)
            result.nodes.append(node)
        result.marked += metadata.get(CAPTURES_KEY, ())
        if node.name() == COMPILED_NODE:
            keep(node)
    return result


def _next_nodes(node: Node, result: Trace) -> list[Node]:
    """Nodes that ``node`` passes gradients to; leaves among them are noted in ``result.leaves`` instead."""
    inner = []
    for child, _ in node.next_functions:
        if child is None:
            continue
        leaf = leaf_of(child)
        if leaf is None:
            inner.append(child)
        elif (segment := segment_of(leaf)) is not None:
            attach(segment, node)
            result.tokens[node] = leaf
        else:
            result.leaves.setdefault(id(leaf), leaf)
    return inner


def leaf_of(node: Node) -> Tensor | None:
    """The leaf tensor that an ``AccumulateGrad`` node stands for."""
    variable = getattr(node, "variable", None)
    return variable if isinstance(variable, torch.Tensor) else None
