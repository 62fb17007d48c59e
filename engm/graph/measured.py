"""What was measured of the rows in one graph: whose they are, which nodes are shared, and where no gradient came."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..capture.calls import Wrapper
from ..distributed import on_any
from ..rules.entries import owners_of
from ..terms.layout import PLAIN, Layout
from ..terms.owners import NOBODY, Ownership
from ..torch_internals import node_outputs
from .arrangement import Arrangement, Arrangements
from .dwarfed import may_be_dwarfed
from .opaque import is_users
from .owners import Key, Question
from .structure import Structure
from .trace import Trace


class Extent(Enum):
    """What the statistics of a batch norm are of if they are not of the whole batch."""

    ONE = "one example, or one for each channel: no example influences another there"
    PART = "several examples, but not all"
    ONE_SEEN = "one example, or one for each channel, as far as rows have a gradient"


@dataclass(frozen=True, eq=False)
class View:
    """How a graph is looked at.

    Attributes:
        couplings: positions of batch norms outside of calls whose statistics are constants.
        through: positions of batch norms of a part of the batch, what is below which is shared.
        own: positions of batch norms of one example, or of one for each channel.
        behind: whether rows behind shared nodes may be owned.
        by_element: whether rows that look like rows of several are asked again, element by element.
        called: positions of the outputs of calls of batch norms that are known of by their nodes alone.
    """

    couplings: tuple[int, ...]
    through: frozenset[int]
    own: frozenset[int]
    behind: bool
    by_element: bool
    called: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Measured:
    """The owners of the rows in a graph, and what follows from them alone.

    Attributes:
        traced: the graph.
        structure: of the graph.
        n: number of examples.
        view: how it was looked at.
        about: how examples lie in tensors of owners.
        nodes: by output of a node, the owners of its rows.
        calls: by number of a call whose gradients a collector alone gets to see, the owners in each of its outputs.
        blind: by tensor, which rows were not finite.
        edges: by node (position) and input (slot), of edges that end where others end too and by which some rows got no
            gradient, the owners of the rows of the gradient that goes there.
        drowned: whether rounding is too large for some example to tell its rows from what cancels.
    """

    traced: Trace
    structure: Structure
    n: int
    view: View
    about: Arrangements
    nodes: Mapping[Key, Tensor]
    calls: Mapping[int, list[Tensor]]
    blind: Mapping[Any, Tensor]
    edges: Mapping[Key, Tensor]
    drowned: bool

    # -- nodes ---------------------------------------------------------------------------------------------------

    @cached_property
    def silent(self) -> set[int]:
        """Positions of the nodes that no gradient comes to."""
        spoken: set[int] = set()
        for (position, _), owners in self.nodes.items():
            if self.about.present(owners).anybody:
                spoken.add(position)
        for key in self.blind:
            spoken.add(self.place_of(key[1]) if key[0] == "call" else key[0])
        for number, parts in self.calls.items():
            if any(self.about.present(owners).anybody for owners in parts):
                spoken.add(self.place_of(number))
        return self.structure.looked_at - spoken

    @cached_property
    def idle(self) -> set[int]:
        """The silent nodes, and those inside of calls that no gradient comes to either."""
        found, inner = set(self.silent), self.structure.inner
        pending = [child for position in found for child in self.traced.children[position]]
        while pending:
            child = pending.pop()
            if child not in inner or child in found or not found.issuperset(self.structure.parents[child]):
                continue
            found.add(child)
            pending += self.traced.children[child]
        return found

    @cached_property
    def spoken(self) -> set[int]:
        """Positions of all other nodes."""
        return set(range(len(self.traced.order))) - self.silent

    @cached_property
    def mixed(self) -> set[int]:
        """Positions of nodes that made a row of several examples."""
        mixed = {position for (position, _), owners in self.nodes.items() if self.about.present(owners).several}
        for number, parts in self.calls.items():
            if number not in self.structure.aside and any(self.about.present(owners).several for owners in parts):
                mixed.add(self.place_of(number))
        return mixed

    @cached_property
    def apart(self) -> set[int]:
        """Positions of the nodes whose rows are of one example each, so that they are owned wherever they lie."""
        if not self.view.behind:
            return set()
        return {position for position, _ in self.nodes} & self.spoken - self.mixed

    @cached_property
    def shared(self) -> set[int]:
        """Positions of nodes in which several examples have a share, and of all below them that they reach.

        A factor of zero, as in ``losses + 0 * unused.sum()``, lets no gradient pass: what is behind it is shared by
        nobody for now, and is watched.
        """
        mixed = self.mixed | {position for position, pure in enumerate(self.structure.pure) if pure}
        for position in self.view.through:  # what is normalised by its own statistics
            mixed |= {c for c in self.traced.children[position] if c is not None and c >= 0}
        return self.structure.below(mixed, self.spoken - (self.apart - mixed))

    def arranged_output(self, position: int, number: int) -> Arrangement | None:
        """Where the examples lie in an output of a node; None if it was not looked at, or got no gradient."""
        owners = self.nodes.get((position, number))
        if position == len(self.traced.order) - 1:
            return Arrangement(PLAIN)
        return None if owners is None else self.about.arranged(owners, self.blind.get((position, number)))

    def laid_out(self, ownership: Ownership, owners: Tensor) -> Tensor:
        """The owners of all rows by their arrangement, whether or not a gradient came to them."""
        of = owners_of(ownership, tuple(owners.shape), self.n, owners.device).of
        return of.view([*of.shape, *[1] * (owners.dim() - of.dim())]).expand_as(owners)

    # -- calls ---------------------------------------------------------------------------------------------------

    def place_of(self, number: int) -> int:
        """The position of the node of a call."""
        return self.traced.positions[self.traced.nodes[number]]

    def parts(self, number: int) -> list[Tensor]:
        """The owners of the rows of a call's outputs."""
        if self.traced.seen_by_collector(number):
            return self.calls.get(number, [])
        owners = self.nodes.get((self.place_of(number), self.traced.calls[number].output_nr))
        return [] if owners is None else [owners]

    def blind_rows(self, number: int) -> Tensor | None:
        """Which rows of a call were not finite."""
        by_collector = self.traced.seen_by_collector(number)
        key: Any = ("call", number) if by_collector else (self.place_of(number), self.traced.calls[number].output_nr)
        found = [rows for other, rows in self.blind.items() if other[:2] == key]
        return found[0] if found else None

    @cached_property
    def calls_apart(self) -> set[int]:
        """Numbers of the calls of which some rows are of one example and others of another."""
        numbers = range(len(self.traced.calls))
        return {k for k in numbers if any(part[part >= 0].unique().numel() > 1 for part in self.parts(k))}

    def some_unseen(self) -> bool:
        """Whether some examples have no rows, so that nothing tells where they would lie."""
        last = len(self.traced.order) - 1
        owners = [owners for (position, _), owners in self.nodes.items() if position != last]
        owners += [part for parts in self.calls.values() for part in parts]
        seen = torch.cat([part.flatten() for part in owners]).unique()
        return int((seen >= 0).sum()) < self.n

    def extent_of(self, position: int, number: int | None = None) -> Extent | None:
        """What the statistics of a batch norm are of; None for the whole batch, and where that cannot be told.

        Args:
            position: of the node.
            number: of the call that it is, if it is one.
        """
        found = [self.nodes.get((position, 0))] if number is None else self.parts(number)
        owners = found[0] if found else None
        if owners is None or (self.traced.group is not None and self.n == 1):
            return None
        arrangement = self.about.arranged(owners)
        if isinstance(arrangement.ownership, Layout):
            owners = self.laid_out(arrangement.ownership, owners)
        channels = owners.unsqueeze(0) if owners.dim() == 1 else owners.movedim(1, 0).flatten(1)
        ordered = channels.sort(1).values
        examples = (ordered[:, 1:] != ordered[:, :-1]).sum(1) + (ordered[:, 0] != NOBODY)  # by channel
        if bool((channels < 0).any()):
            most = int(examples.max())
            # An example whose loss is a constant has no rows anywhere: the batch is that of the others.
            part = number is not None and most < self._in_calls()
            if most == 1 and (part or number is None):
                return Extent.ONE_SEEN
            return Extent.PART if part else None
        if int(examples.max()) <= 1:
            return Extent.ONE
        return Extent.PART if int(examples.min()) < self.n else None

    def _in_calls(self) -> int:
        """How many examples have rows in the outputs of captured calls."""
        found = [part.flatten() for number in range(len(self.traced.calls)) for part in self.parts(number)]
        return int((torch.cat(found).unique() >= 0).sum()) if found else 0


def measured(
    model: Wrapper, structure: Structure, losses: Tensor, seed: float, view: View, about: Arrangements
) -> Measured:
    """Find the owners of the outputs of all nodes that are of interest.

    Args:
        model: the wrapper whose losses they are.
        structure: of the graph behind them.
        losses: ``[n]``.
        seed: what losses are multiplied by in backward passes.
        view: how to look at the graph.
        about: of all tensors of owners of the graph.
    """
    traced, n = structure.traced, losses.shape[0]
    positions = structure.looked_at
    if n == 1 and traced.group is None:  # all there is belongs to the one example
        nodes, calls = _of_one(traced, positions)
        return Measured(traced, structure, n, view, about, nodes, calls, {}, {}, False)
    through = view.through | view.own | view.called
    question = Question(traced, losses, seed, view.couplings, through, traced.group)
    edges = _meeting(structure)
    question.ask(positions, edges=edges, cancelling=view.behind)
    suspects = _suspects(model, structure, n, about, question.nodes)
    if view.by_element and on_any(traced.group, bool(suspects), losses.device):
        within = {p: [s for s in slots if traced.children[p][s] in suspects] for p, slots in edges.items()}
        ending = {p: slots for p, slots in within.items() if slots}
        question.ask(suspects, by_element=True, edges=ending, cancelling=view.behind)
    dwarfed = may_be_dwarfed(structure, about, question.nodes)
    if on_any(traced.group, bool(dwarfed), losses.device):
        question.part_dwarfed(dwarfed)
    found = question.nodes, question.calls, question.blind, question.edges, question.drowned
    return Measured(traced, structure, n, view, about, *found)


def _of_one(traced: Trace, positions: Collection[int]) -> tuple[dict[Key, Tensor], dict[int, list[Tensor]]]:
    nodes = {}
    for position in positions:
        for number, output in enumerate(node_outputs(traced.order[position])):
            shape = tuple(output.shape) if not output.is_nested_tensor else ()
            nodes[position, number] = torch.zeros(shape[:1], dtype=torch.long, device="cpu")
    calls = {
        number: [torch.zeros(call.batch, dtype=torch.long, device="cpu")]
        for number, call in enumerate(traced.calls)
        if traced.seen_by_collector(number)
    }
    return nodes, calls


def _meeting(structure: Structure) -> dict[int, list[int]]:
    """The inputs (slots), by node, of the edges that end where others end too, and may bring other rows than these."""
    traced, positions = structure.traced, structure.looked_at
    ends: dict[tuple[int, int], list[Key]] = {}
    for position, node in enumerate(traced.order):
        for slot, child in enumerate(traced.children[position]):
            if child is None:
                continue
            if structure.is_input(child) if child < 0 else child in positions and structure.trains[child]:
                ends.setdefault((child, node.next_functions[slot][1]), []).append((position, slot))
    found: dict[int, list[int]] = {}
    for edges in ends.values():
        for position, slot in edges if len(edges) > 1 else ():
            found.setdefault(position, []).append(slot)
    return found


def _suspects(
    model: Wrapper, structure: Structure, n: int, about: Arrangements, nodes: Mapping[Key, Tensor]
) -> set[int]:
    """Nodes of which some row looks like one of several, though what lies below is the examples' own.

    The examples may lie along the last dimension, or numbers may be too small to be told apart by powers of two.
    """
    traced = structure.traced
    mixed = {position for (position, _), owners in nodes.items() if about.present(owners).several}
    apart = {position for (position, _), owners in nodes.items() if about.present(owners).apart}
    owned: list[bool] = []
    for position, children in enumerate(traced.children):
        own = position in apart - mixed
        owned.append(own or any(owned[child] for child in children if child is not None and child >= 0))
    # What clips every element by itself makes rows look mixed in which nothing tells of the examples' data. And a
    # node with rows of one example beside rows of several may have them along its last dimension.
    all_of_them = traced.hooked or any(map(is_users, traced.order)) or not apart.isdisjoint(mixed)
    return {
        p
        for p in mixed
        if structure.trains[p] and (all_of_them or owned[p] or structure.reads_data(p, model, n) is not None)
    }
