"""Reading an autograd graph: which captured calls a loss reaches, in which order, and through which parameters.

Captured calls are found here and nowhere else. A call is written into the metadata of the autograd node of its
output, so it lives exactly as long as the graph it belongs to, whatever else the user does with the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .capture import CALLS_KEY, Call

Node = Any  # torch.autograd.graph.Node; C++ nodes do not subclass it


@dataclass
class Trace:
    """What :func:`trace` found behind a loss.

    Attributes:
        calls: captured calls, those nearest to the losses first.
        nodes: the node of each call, in the same order.
        sinks: gradient edges such that a backward pass to them runs through every captured call, and computes no
            parameter gradient on the way.
        uses: for every leaf (by ``id``), the leaf and the nodes that use it.
        root: the node of the losses.
    """

    calls: list[Call] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    sinks: list[GradientEdge] = field(default_factory=list)
    uses: dict[int, tuple[Tensor, list[Node]]] = field(default_factory=dict)
    root: Node = None

    @property
    def couples(self) -> bool:
        """Whether some captured batch norm on the way takes its statistics from the batch."""
        return any(call.couples for call in self.calls)

    def unseen_uses(self, parameters: Iterable[tuple[str, Tensor]]) -> list[tuple[str, str]]:
        """``(parameter name, autograd node)`` for every use of a parameter outside the captured calls.

        A use inside a call counts as outside if a gradient also flows to it from elsewhere: the weight that a gradient
        penalty differentiates a second time.
        """
        owned: dict[int, list[tuple[Call, Node]]] = {}
        for call, node in zip(self.calls, self.nodes, strict=True):
            for own in call.parameters.values():
                owned.setdefault(id(own), []).append((call, node))
        consumers = self.consumers()
        unseen = []
        for name, parameter in parameters:
            _, users = self.uses.get(id(parameter), (None, []))
            seen = _seen_from_calls(owned.get(id(parameter), []), consumers) if users else set()
            unseen += [(name, user.name()) for user in users if user not in seen]
        return unseen

    def consumers(self) -> dict[Node, list[Node]]:
        """For every node behind the losses, the nodes that pass gradients to it."""
        found: dict[Node, list[Node]] = {self.root: []}
        stack = [self.root]
        while stack:
            node = stack.pop()
            for child, _ in node.next_functions:
                if child is None:
                    continue
                if child not in found:
                    found[child] = []
                    stack.append(child)
                found[child].append(node)
        return found


def trace(losses: Tensor) -> Trace:
    """Walk the graph behind ``losses`` once, depth first, without touching it."""
    result = Trace()
    root = result.root = losses.grad_fn
    if root is None:
        return result
    deep: dict[Node, bool] = {}  # node -> a captured call lies at it or deeper
    order: list[tuple[Node, list[Call], bool]] = []
    stack: list[tuple[Node, list[Node], int, bool]] = [(root, _next_nodes(root, result), 0, False)]
    deep[root] = False
    while stack:
        node, children, position, below = stack.pop()
        if position < len(children):
            child = children[position]
            if child in deep:
                stack.append((node, children, position + 1, below or deep[child]))
            else:
                deep[child] = False
                stack.append((node, children, position, below))
                stack.append((child, _next_nodes(child, result), 0, False))
            continue
        calls = node.metadata.get(CALLS_KEY, [])
        if calls:
            order.append((node, calls, below))
        deep[node] = below or bool(calls)
    for node, calls, below in reversed(order):
        if not below:
            result.sinks.extend(GradientEdge(node, number) for number in {call.output_nr for call in calls})
        for call in calls:
            result.calls.append(call)
            result.nodes.append(node)
    return result


def _next_nodes(node: Node, result: Trace) -> list[Node]:
    """Nodes that ``node`` passes gradients to; leaves among them are noted in ``result.uses`` instead."""
    inner = []
    for child, _ in node.next_functions:
        if child is None:
            continue
        leaf = _leaf(child)
        if leaf is None:
            inner.append(child)
        else:
            result.uses.setdefault(id(leaf), (leaf, []))[1].append(node)
    return inner


def _leaf(node: Node) -> Tensor | None:
    """The leaf tensor that an ``AccumulateGrad`` node stands for."""
    variable = getattr(node, "variable", None)
    return variable if isinstance(variable, torch.Tensor) else None


def _seen_from_calls(calls: list[tuple[Call, Node]], consumers: dict[Node, list[Node]]) -> set[Node]:
    """Nodes between output and input of these calls, less those that gradients also reach some other way.

    The calls are taken together because they may share nodes: autocast casts a weight once for all of them.
    """
    within: dict[Node, list[Node]] = {}
    for call, node in calls:
        pending = [node]
        for current in pending:
            if current not in within:
                within[current] = _inside(current, call)
                pending += within[current]
    outputs = {node for _, node in calls}
    outside = [node for node in within if node not in outputs and any(user not in within for user in consumers[node])]
    for node in outside:
        outside += [child for child in within[node] if child not in outside]
    return set(within) - set(outside)


def _inside(node: Node, call: Call) -> list[Node]:
    """Nodes next to ``node`` that still lie between the output and the input of ``call``."""
    return [
        child
        for child, _ in node.next_functions
        if child is not None
        and child is not call.input_node
        and _leaf(child) is None
        and CALLS_KEY not in child.metadata
    ]
