"""What the nodes of a graph hold, and by which edges shared tensors enter outside of captured calls.

The nodes of a graph are of two kinds. Nodes *of the batch* hold rows of the examples: captured calls, and whatever is
computed from them. *Shared* nodes are computed from parameters alone and are the same for every example: the transpose
of a weight, a weight under ``weight_norm``, an embedded position table. Where a shared tensor meets the batch, the
tensor *enters*; there its per-example gradients can be read (:mod:`engm.rules.operators`), and pulled back to the
parameters that it was computed from. The graph tells most of this by itself. But data that require no gradient are not
in the graph, so whether ``parameter * something`` holds rows of the batch is seen from gradients
(:mod:`engm.graph.planning`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from torch import nn

from ..capture.calls import CALLS_KEY, Call
from ..rules.entries import BATCH_NORMS, Entry, enters_by_broadcast, has_rule
from ..terms.layout import PLAIN, Layout, layouts_of
from ..torch_internals import (
    SYNC_BATCH_NORM_NODE,
    Node,
    batch_norm_statistics,
    entering_shape,
    is_compiled_region,
    is_python_function,
    leaf_of,
    node_name,
    node_outputs,
    operator_name,
    output_shape,
)
from .plan import Plan, PlannedEntry, Source
from .trace import Trace

# Operators that hand on the elements of their input as they are, each at most once: gradients keep their norm.
REARRANGING = frozenset(
    [
        "T",
        "Transpose",
        "Permute",
        "View",
        "ReshapeAlias",
        "UnsafeView",
        "Unsqueeze",
        "Squeeze",
        "Slice",
        "Select",
        "Split",
        "SplitWithSizes",
        "Unbind",
        "Clone",
        "Alias",
        "ToCopy",
        "Tap",
    ]
)

# Operators that may read data which the graph does not show, although each of their inputs requires a gradient.
INDEXING = frozenset(
    [
        "Expand",
        "Repeat",
        "RepeatInterleave",
        "Index",
        "IndexSelect",
        "Gather",
        "Take",
        "Embedding",
        "Where",
        "MaskedFill",
        "MaskedSelect",
        "Scatter",
        "IndexPut",
        "IndexAdd",
    ]
)


class Kind(Enum):
    """What a node of a graph holds."""

    NEUTRAL = 0  # nothing that is trained
    SHARED = 1  # what is computed from trained parameters alone
    UNDECIDED = 2  # what is computed from trained parameters, and perhaps from data that are not in the graph
    BATCH = 3  # rows of the examples


@dataclass
class Choices:
    """What the shapes of a graph leave open.

    Attributes:
        calls: the layouts that each call may have; with none the call sees no batch.
        nodes: by position, the layouts that other nodes may have, as far as these were asked for.
        batch: by position, whether an undecided node holds rows of the batch.
    """

    calls: list[list[Layout]]
    nodes: dict[int, list[Layout]] = field(default_factory=dict)
    batch: dict[int, bool] = field(default_factory=dict)


class Structure:
    """The kinds of all nodes of a graph under given choices.

    Args:
        traced: the graph.
        n: number of examples.
        views: rows of an example that the user announced.
        trained: ids of the parameters that norms are taken over.
        choices: what was chosen so far.

    Attributes:
        kinds: one :class:`Kind` for every node of ``traced.order``.
        entering: ``(position, slot)`` of every edge by which a shared or undecided tensor enters outside of a call.
        broken: calls whose parameters are also reached by gradients that do not pass the call's output.
    """

    def __init__(self, traced: Trace, n: int, views: int, trained: set[int], choices: Choices) -> None:
        self.traced, self.n, self.views, self.trained, self.choices = traced, n, views, trained, choices
        self._calls_at: dict[int, list[int]] = {}
        for number, node in enumerate(traced.nodes):
            self._calls_at.setdefault(traced.positions[node], []).append(number)
        self._interiors = self._find_interiors()
        self._inner_nodes = set().union(*self._interiors)
        self._outside: dict[int, set[Node]] = {}
        self._parents: list[list[Node]] = [[] for _ in traced.order]
        for parent in traced.order:
            for child, _ in parent.next_functions:
                if child in traced.positions:
                    self._parents[traced.positions[child]].append(parent)
        self.broken: dict[int, str] = {}
        self.kinds: list[Kind] = []
        self._edges: list[tuple[int, int]] = []
        for position in range(len(traced.order)):
            self.kinds.append(self._kind(position))
        self.entering = [edge for edge in self._edges if not self._covered(*edge)]

    # -- kinds -------------------------------------------------------------------------------------------------

    def _kind(self, position: int) -> Kind:
        node = self.traced.order[position]
        kinds = [self._child_kind(child) for child, _ in node.next_functions]
        kind = self._from_children(position, kinds)
        if kind is Kind.BATCH:
            shared = (Kind.SHARED, Kind.UNDECIDED)
            self._edges += [(position, slot) for slot, child in enumerate(kinds) if child in shared]
        return kind

    def _from_children(self, position: int, kinds: Sequence[Kind]) -> Kind:
        root = position == len(self.traced.order) - 1
        if root or any(self.choices.calls[number] for number in self._calls_at.get(position, ())):
            return Kind.BATCH
        if Kind.BATCH in kinds:
            return Kind.BATCH
        if Kind.SHARED not in kinds and Kind.UNDECIDED not in kinds:
            return Kind.NEUTRAL
        if is_compiled_region(self.traced.order[position]):
            return Kind.BATCH  # a compiled region does not tell what it does with its parameters
        decided = self.choices.batch.get(position)
        if decided is not None:
            return Kind.BATCH if decided else Kind.SHARED
        if Kind.NEUTRAL not in kinds and not reads_more(self.traced.order[position]):
            return Kind.UNDECIDED if Kind.UNDECIDED in kinds else Kind.SHARED
        if self.traced.order[position] in self._inner_nodes:
            return Kind.BATCH  # between the output of a call of the batch and its input
        return Kind.UNDECIDED if self.layouts(position) or Kind.UNDECIDED in kinds else Kind.SHARED

    def _child_kind(self, child: Node) -> Kind:
        if child is None:
            return Kind.NEUTRAL
        leaf = leaf_of(child)
        if leaf is None:
            return self.kinds[self.traced.positions[child]]
        if id(leaf) in self.trained:
            return Kind.SHARED
        weight = isinstance(leaf, nn.Parameter)  # a parameter that is not trained here
        return Kind.BATCH if not weight and layouts_of(leaf.shape[:1], self.n) else Kind.NEUTRAL

    def layouts(self, position: int) -> list[Layout]:
        """The layouts that the (first) output of a node may have."""
        if position == len(self.traced.order) - 1:
            return [PLAIN]
        if position not in self.choices.nodes:
            shape = output_shape(self.traced.order[position])
            self.choices.nodes[position] = layouts_of(shape, self.n, self.views)
        return self.choices.nodes[position]

    def undecided(self) -> list[int]:
        """Positions of the nodes that the graph alone does not decide."""
        return [position for position, kind in enumerate(self.kinds) if kind is Kind.UNDECIDED]

    # -- calls -------------------------------------------------------------------------------------------------

    def _find_interiors(self) -> list[set[Node]]:
        """For every call of the batch, the nodes between its output and its inputs."""
        found: list[set[Node]] = []
        for call, node, possible in zip(self.traced.calls, self.traced.nodes, self.choices.calls, strict=True):
            within: set[Node] = set()
            pending = [node] if possible else []
            while pending:
                current = pending.pop()
                if current not in within:
                    within.add(current)
                    region = current in self.traced.tokens and not call.rule.whole_call  # the whole call is one node
                    pending += [] if region else _inside(current, call)
            found.append(within)
        return found

    def _covered(self, position: int, slot: int) -> bool:
        """Whether the call that an edge lies in accounts for what enters by the edge."""
        node = self.traced.order[position]
        child = node.next_functions[slot][0]
        entering = {source.parameter for source in self.sources(child)}
        for number, within in enumerate(self._interiors):
            if node not in within:
                continue
            own = {id(p) for p in self.traced.calls[number].parameters.values()}
            if not entering & own:
                continue
            if entering <= own and node not in self._reached_otherwise(number):
                return True
            self.broken[number] = node_name(node)
        return False

    def _reached_otherwise(self, number: int) -> set[Node]:
        """Nodes of the batch inside a call that gradients reach by another way than through the call's output."""
        if number not in self._outside:
            within, output = self._interiors[number], self.traced.nodes[number]
            outside = [
                node
                for node in within
                if node is not output
                and self.kinds[self.traced.positions[node]] is Kind.BATCH
                and any(parent not in within for parent in self._parents[self.traced.positions[node]])
            ]
            for node in outside:
                outside += [child for child in _inside(node, self.traced.calls[number]) if child not in outside]
            self._outside[number] = set(outside)
        return self._outside[number]

    # -- sources -----------------------------------------------------------------------------------------------

    def sources(self, child: Node) -> list[Source]:
        """Trained parameters that a shared tensor is computed from."""
        found: dict[int, Source] = {}
        rearranged, pending, visited = True, [child], set()
        while pending:
            node = pending.pop()
            leaf = leaf_of(node)
            if leaf is not None:
                if id(leaf) in self.trained:
                    found[id(leaf)] = Source(id(leaf), rearranged)
            elif node not in visited:
                visited.add(node)
                inner = [c for c, _ in node.next_functions if c is not None]
                rearranged = rearranged and len(inner) == 1 and operator_name(node) in REARRANGING
                pending += inner
        return list(found.values())

    def calls_behind(self, child: Node) -> list[int]:
        """Calls among the shared nodes that an entering tensor is computed from."""
        pending, visited = [child], set()
        found = []
        while pending:
            node = pending.pop()
            if node is None or node in visited or leaf_of(node) is not None:
                continue
            visited.add(node)
            found += self._calls_at.get(self.traced.positions[node], [])
            pending += [c for c, _ in node.next_functions]
        return found

    # -- the plan ----------------------------------------------------------------------------------------------

    def entry(self, position: int, slot: int, layout: Layout) -> PlannedEntry:
        """The entry of the tensor that enters by an edge."""
        node = self.traced.order[position]
        child, number = node.next_functions[slot]
        transposed = operator_name(node) in ("Mm", "Addmm") and leaf_of(child) is None and operator_name(child) == "T"
        if transposed:
            child, number = child.next_functions[0]
        return PlannedEntry(
            position, slot, entering_shape(child, number), layout, transposed, tuple(self.sources(child))
        )

    def plan(self) -> Plan:
        """The plan by these choices; where several layouts are left the first is taken."""
        planned = (self.entry(position, slot, self.layouts(position)[0]) for position, slot in self.entering)
        entries = tuple(replace(entry, ruled=has_rule(entry.at(self.traced, self.n))) for entry in planned)
        layouts = tuple(possible[0] if possible else None for possible in self.choices.calls)
        sinks = self.sinks({entry.position for entry in entries})
        of_all_ranks = any(node_name(node).startswith(SYNC_BATCH_NORM_NODE) for node in self.traced.order)
        return Plan(layouts, entries, sinks, self.couplings(), of_all_ranks)

    def sinks(self, positions: Iterable[int]) -> tuple[tuple[int, int], ...]:
        """Edges such that a pass to them runs through all calls of the batch and the nodes at ``positions``."""
        wanted: dict[int, set[int]] = {}
        for number, possible in enumerate(self.choices.calls):
            if possible:
                position = self.traced.positions[self.traced.nodes[number]]
                wanted.setdefault(position, set()).add(self.traced.calls[number].output_nr)
        for position in positions:
            outputs = range(len(node_outputs(self.traced.order[position])))
            wanted.setdefault(position, set()).update(outputs)
        deep: list[bool] = []
        sinks = []
        for position, node in enumerate(self.traced.order):
            below = any(
                deep[self.traced.positions[child]]
                for child, _ in node.next_functions
                if child is not None and child in self.traced.positions
            )
            deep.append(below or position in wanted)
            if position in wanted and not below:
                sinks += [(position, number) for number in sorted(wanted[position])]
        return tuple(sinks)

    def couplings(self) -> tuple[int, ...]:
        """Positions of batch norms outside of calls that take their statistics from the batch."""
        found = []
        for position, node in enumerate(self.traced.order):
            if operator_name(node) in BATCH_NORMS and self.kinds[position] is Kind.BATCH:
                called = node in self._inner_nodes  # an instance norm is a batch norm inside
                statistics = batch_norm_statistics(node)
                if not called and (statistics is None or statistics[2]) and output_shape(node)[0] % self.n == 0:
                    found.append(position)
        return tuple(found)


def reads_more(node: Node) -> bool:
    """Whether an operator may read data besides its differentiable inputs."""
    own = is_python_function(node) and operator_name(node) != "Tap"  # a user's own function
    return own or operator_name(node) in INDEXING


def _inside(node: Node, call: Call) -> list[Node]:
    """Nodes next to ``node`` that still lie between the output and the input of ``call``."""
    return [
        child
        for child, _ in node.next_functions
        if child is not None
        and child not in call.input_nodes
        and leaf_of(child) is None
        and (call.rule.generic or CALLS_KEY not in child.metadata)
    ]


def likely_batch(structure: Structure, position: int) -> bool:
    """Whether an undecided node probably holds rows of the batch, by its shape and operator alone."""
    node = structure.traced.order[position]
    possible = structure.layouts(position)
    if not possible:
        return False
    for slot, (child, number) in enumerate(node.next_functions):
        if child is None:
            continue
        entry = Entry(node, slot, entering_shape(child, number), possible[0], structure.n)
        if not enters_by_broadcast(entry):
            return False
    others = any(child is None for child, _ in node.next_functions)
    return others or operator_name(node) in ("Expand", "Repeat", "Embedding")


def undecided_calls(traced: Trace, n: int, views: int) -> list[list[Layout]]:
    """The layouts that each call of a graph may have by its shape."""
    found = []
    for call in traced.calls:
        possible = layouts_of(call.shape, n, views)
        found.append([layout for layout in possible if layout.dim == 0 or call.rule.positionwise])
    return found
