"""Reading an autograd graph: which captured calls the losses reach, in which order, and through which leaves.

Captured calls are found here and nowhere else: on the graph's nodes (:mod:`engm.capture.calls`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .._C import walk_graph
from ..batch_norm.frozen import BatchNormNode, frozen_statistics, gain_of, gain_of_node
from ..capture.calls import Call, Capture, Collector, Wrapper, collecting
from ..capture.compiled import SEGMENT_KEY, calls_in
from ..distributed import Ranks
from ..terms.owners import Ownership
from ..torch_internals import (
    Node,
    is_kind_of_region,
    is_sync_batch_norm,
    let_graph_be_kept,
    node_outputs,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass
class Trace:
    """What :func:`trace` found behind the losses.

    Attributes:
        owner: the wrapper whose losses they are taken to be.
        trained: names and tensors of the parameters that norms are taken over.
        order: all nodes but those of leaves, each after the nodes that it passes gradients to; the losses' is the last.
        kinds: the types of the nodes of ``order``.
        children: for every node of ``order`` the positions of the nodes behind its inputs; None for an input without a
            gradient, and ``-2 - k`` for the leaf that was met as number ``k``.
        number: which output of the last node of ``order`` the losses are.
        numbers: for every node of ``order`` which outputs of the nodes behind are its inputs; empty: all the first.
        shapes: for every node of ``order`` the shapes of its outputs, None for one without a shape in plain numbers.
        calls: captured calls, those nearest to the losses first.
        places: the positions in ``order`` of the nodes of the calls.
        nodes: the node of each call, in the same order.
        marked: forward passes whose outputs were met.
        leaves: every leaf (by ``id``), in the order they were met.
        tokens: by compiled region, the leaf that a backward pass must go to for the region to run
            (:mod:`engm.capture.compiled`).
        hooked: whether hooks of the user's hang in the graph. One that clips a gradient by its norm makes examples
            influence each other once it bites. Under ``fully_shard`` the answer is no: torch hangs hooks of its own.
        rows_of_inputs: by tensors (``id``), where the examples lie in them, for those that were asked about.
    """

    owner: Wrapper | None = None
    trained: Sequence[tuple[str, nn.Parameter]] = ()
    order: list[Node] = field(default_factory=list)
    kinds: tuple[type, ...] = ()
    children: list[tuple[int | None, ...]] = field(default_factory=list)
    number: int = 0
    numbers: list[tuple[int, ...]] = field(default_factory=list)
    shapes: list[tuple[tuple[int, ...] | None, ...]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    marked: list[Capture] = field(default_factory=list)
    leaves: dict[int, Tensor] = field(default_factory=dict)
    tokens: dict[Node, Tensor] = field(default_factory=dict)
    hooked: bool = False
    rows_of_inputs: dict[tuple[int, ...], tuple[Ownership, ...]] = field(default_factory=dict)

    @cached_property
    def positions(self) -> dict[Node, int]:
        """The index in :attr:`order` of every node."""
        return {node: position for position, node in enumerate(self.order)}

    @property
    def n(self) -> int:
        """How many losses there are."""
        shape = self.shapes[-1][self.number]
        assert shape is not None
        return shape[0]

    @cached_property
    def captures(self) -> list[Capture]:
        """The captured forward passes behind the losses."""
        return list({id(c): c for c in (*self.marked, *(call.capture for call in self.calls))}.values())

    @cached_property
    def own_captures(self) -> list[Capture]:
        """The captured forward passes that were the owner's."""
        return [capture for capture in self.captures if capture.owner is self.owner]

    @cached_property
    def own(self) -> list[Call]:
        """The calls of the owner's forward passes, and those of other wrappers that read parameters of the owner's."""
        captures = {id(capture) for capture in self.own_captures}
        if len(captures) == len(self.captures):
            return self.calls
        trained = {id(parameter) for _, parameter in self.trained}
        return [
            call
            for call in self.calls
            if id(call.capture) in captures or not trained.isdisjoint(map(id, call.parameters.values()))
        ]

    @property
    def couples(self) -> bool:
        """Whether some captured batch norm takes its statistics from the batch."""
        return any(call.couples for call in self.calls)

    def edge(self, position: int, number: int) -> GradientEdge:
        """What to differentiate with respect to for a backward pass to reach an output of a node."""
        token = self.tokens.get(self.order[position])
        return GradientEdge(self.order[position], number) if token is None else get_gradient_edge(token)

    def collecting(self, collector: Collector) -> AbstractContextManager[None]:
        """While the context is open, backward passes hand the gradients of all calls to ``collector``."""
        return collecting(self.captures, collector)

    def frozen_statistics(
        self, outside: Iterable[int], through: Collection[int] = (), gains: dict[int, Tensor] | None = None
    ) -> AbstractContextManager[None]:
        """While the context is open, backward passes take the statistics of batch norms for constants.

        Args:
            outside: positions of the batch norms that are not captured calls.
            through: positions of the nodes of captured calls that are left as they are.
            gains: where ``scale / sigma``, ``[C]``, is noted by call (``id``) as the pass goes. When it is over the
                scales of ``fully_shard`` may be split again.
        """

        def gain(call: Call) -> Tensor:
            found = gain_of(call.module, call.saved[1])
            if gains is not None:
                gains[id(call)] = found
            return found

        called = [
            BatchNormNode(node, partial(gain, call), call.slot, call.output_nr)
            for call, node in zip(self.calls, self.nodes, strict=True)
            if call.couples and self.positions[node] not in through
        ]
        others = [self.order[position] for position in outside]
        return frozen_statistics([*called, *(BatchNormNode(node, partial(gain_of_node, node)) for node in others)])

    @cached_property
    def synchronised(self) -> bool:
        """Whether some batch norm takes its statistics from the batches of several processes."""
        return any(map(is_sync_batch_norm, self.order))

    @cached_property
    def dtypes(self) -> set[torch.dtype]:
        """The types of the numbers that the nodes made."""
        return {output.dtype for node in self.order for output in node_outputs(node)}

    @property
    def unit(self) -> float:
        """One unit in the last place of 1, in the coarsest type of these numbers."""
        return max(torch.finfo(dtype).eps for dtype in self.dtypes if dtype.is_floating_point or dtype.is_complex)

    def seen_by_collector(self, number: int) -> bool:
        """Whether only a collector sees the gradient of a call, in the order that the call's rule has."""
        return self.calls[number].rule.whole_call or self.nodes[number] in self.tokens

    def enters_as_leaf(self, position: int, slot: int, turns: int) -> bool:
        """Whether an input of a node is a leaf, or what so many transpositions in a row make of one."""
        child = self.children[position][slot]
        for _ in range(turns):
            if child is not None and child >= 0:
                child = self.children[child][0]
        return child is not None and child < 0

    def deepest(self, positions: Collection[int]) -> list[int]:
        """Those of some nodes below which there is no other of them: where a pass through all of them may end."""
        deep: list[bool] = []
        found = []
        for position, children in enumerate(self.children):
            below = any(child is not None and child >= 0 and deep[child] for child in children)
            deep.append(below or position in positions)
            if position in positions and not below:
                found.append(position)
        return found

    @cached_property
    def group(self) -> ProcessGroup | None:
        """The processes that every backward pass through the graph is of, if it is not of this one alone.

        They are where parameters are split over processes, or batch statistics are taken over them. Whatever passes one
        of them needs, all have to run.
        """
        ranks = self.ranks
        if ranks is None or self.owner is None:
            return None
        return ranks.group if self.synchronised or self.owner.shard_group is not None else None

    @contextmanager
    def still_buffers(self) -> Iterator[None]:
        """While the context is open, backward passes leave the network's buffers as they are.

        A checkpoint runs a part of the network again in every pass, and batch norms in it would move their running
        statistics each time.
        """
        if self.owner is None or not any(capture.packs for capture in self.captures):
            yield
            return
        # As other tensors of the same memory, whose versions do not tell autograd that something changed.
        kept = [(buffer.data, buffer.detach().clone()) for buffer in self.owner.buffers()]
        try:
            yield
        finally:
            for buffer, before in kept:
                buffer.copy_(before)

    def release(self) -> None:
        """Let go of what the owner's calls remember, before the graph itself is gone."""
        for call in self.own:
            call.release()

    @property
    def ranks(self) -> Ranks | None:
        """The processes whose batches make up this batch; None where the owner's forward passes ran in one alone."""
        return next((capture.ranks for capture in self.own_captures if capture.ranks is not None), None)


def _nearest_first(record: tuple[int, object]) -> int:
    return -record[0]


def trace(losses: Tensor, owner: Wrapper | None = None, trained: Sequence[tuple[str, nn.Parameter]] = ()) -> Trace:
    """Walk the graph behind ``losses`` once, depth first, without touching it.

    Args:
        losses: any tensor with a graph.
        owner: the wrapper whose calls count as the result's own.
        trained: names and tensors of the parameters that norms are to be taken over.
    """
    result = Trace(owner, trained)
    order, result.children, result.numbers, result.shapes, leaves, tokens, records, hooked = walk_graph(
        losses, SEGMENT_KEY
    )
    result.order, result.number = order, losses.output_nr
    result.kinds = tuple(map(type, order))
    result.hooked = hooked and (owner is None or owner.shard_group is None)
    result.leaves = {id(leaf): leaf for leaf in leaves}
    for position, token in tokens:
        if order[position] not in result.tokens:
            records += [(position, call) for call in calls_in(token, order[position])]
            result.tokens[order[position]] = token
    records.sort(key=_nearest_first)
    for position, record in records:
        if isinstance(record, Capture):
            result.marked.append(record)
        else:
            result.calls.append(record)
            result.places.append(position)
    result.nodes = [order[position] for position in result.places]
    for kind in set(result.kinds):
        if is_kind_of_region(kind):
            let_graph_be_kept(kind)
    return result
