"""Planning: in which rows does each example lie behind these losses, and where do parameters enter?

Both are measured on a graph (:mod:`engm.graph.owners`) and hold for every graph of the same structure and routing
(:mod:`engm.graph.routing`). A node whose rows belong to one example each is *owned*; one in which several examples have
a share is *shared*, and so is all that lies below it. Where gradients go from an owned node to a shared one or to a
parameter, outside of what a captured call accounts for, that *enters*: there its per-example gradients are read, and
pulled back to the parameters behind. Every path from the losses to a parameter crosses this border once, so the sum
over all entries and calls is the gradient, whatever lies below. If the examples' own data lie below, they influence
each other: the batch is *coupled* there.

They do not if all that comes out below of a node that several have a share in are rows of one example each again: a row
of padding that many read may end in a constant, and what sums have in common may cancel in their difference. So before
a batch counts as coupled, it is looked *behind* the shared nodes for such rows. What is behind is owned again; a shared
node is then no more than a place that gradients pass through.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .._C import is_hooked
from ..capture.calls import Call, Wrapper
from ..checks import RefusedError
from ..distributed import on_any
from ..rules.entries import has_rule, owners_of
from ..terms.layout import PLAIN, Layout
from ..terms.owners import NOBODY, Owners, Ownership
from ..torch_internals import (
    BATCH_NORMS,
    batch_norm_statistics,
    entering_shape,
    is_compiled_region,
    node_name,
    node_outputs,
    operator_name,
    output_shape,
    own_parameters,
    saved_option,
)
from .arrangement import Arrangement, Arrangements
from .fitting import OwnersOnDevice, agreed, fits
from .opaque import is_users, opaque_functions, refuse_hidden_passes
from .owners import Key, Question
from .plan import Junction, OpaqueFunction, Plan, PlannedEntry, Route, sinks_of
from .routing import CHOOSING, ELEMENTWISE, HANDING_ON, MOVING, PICKING, repeats_rows, routes_of
from .structure import Structure
from .trace import Trace


def make_plan(model: Wrapper, traced: Trace, losses: Tensor, seed: float = 1.0, cancels: bool = False) -> Plan:
    """The plan of a graph.

    Args:
        model: the wrapper whose losses they are.
        traced: the graph.
        losses: ``[n]``.
        seed: what losses are multiplied by in backward passes (a loss scale for float16).
        cancels: shares of other examples cancelled in graphs of the same skeleton, so look there at once.

    Raises:
        RuntimeError: the examples influence each other and the model refuses that, or a parameter is used where its
            per-example gradients cannot be told; names the layer or the parameter, and says what to do.
    """
    refuse_hidden_layers(traced)
    check_parameters(traced)
    refuse_hidden_passes(traced, losses, seed)
    planner = _Planner(model, traced, losses, seed)
    found = planner.plan_behind() if cancels else None
    return planner.plan() if found is None else found


class Extent(Enum):
    """What the statistics of a batch norm are of if they are not of the whole batch."""

    ONE = "one example, or one for each channel: no example influences another there"
    PART = "several examples, but not all"


class _Planner:
    """Measures a graph, and once more where the answer is that calls cannot account for their parameters."""

    def __init__(self, model: Wrapper, traced: Trace, losses: Tensor, seed: float) -> None:
        self.model, self.traced, self.losses, self.seed = model, traced, losses, seed
        self.n = losses.shape[0]
        self.names = {id(parameter): name for name, parameter in traced.trained}
        self.group = traced.group
        self.aside = account_by_operators(traced.calls)
        self.settled: set[int] = set()  # calls that were set aside, or brought back, and stay so
        self.through: set[int] = set()  # positions of batch norms of a part of the batch
        self.own: set[int] = set()  # positions of batch norms of one example, or of one for each channel
        self.nodes: dict[Key, Tensor] = {}
        self.calls: dict[int, list[Tensor]] = {}
        self.blind: dict[Any, Tensor] = {}
        self.edges: dict[Key, Tensor] = {}
        self.behind = False  # whether rows behind shared nodes may be owned
        self.by_element = True  # whether rows that look like rows of several are asked again
        self.drowned = False  # whether rounding is too large for some example to tell its rows there
        self._on_device = OwnersOnDevice(losses.device)
        self.about = Arrangements(self.n)

    def plan(self) -> Plan:
        """The plan, from the front."""
        self._settle()
        self._refuse_regions()
        found = self.plan_behind(self) if self._may_look_behind() and self._couples() else None
        return self._planned() if found is None else found

    def plan_behind(self, front: _Planner | None = None) -> Plan | None:
        """The plan if the examples' data lie behind shared nodes in rows of one example each, else None.

        Args:
            front: knows how it looks from the front.
        """
        for by_element in (False, True):  # the examples may lie along the last dimension
            behind = _Planner(self.model, self.traced, self.losses, self.seed)
            behind.behind, behind.by_element = True, by_element
            with suppress(RefusedError):  # what is refused otherwise is told as it looks from the front
                behind._settle()
                behind._refuse_regions()
                if behind._couples():
                    continue
                if not (behind.drowned or behind._meets_again()):
                    cancels = front is None or not behind._apart().isdisjoint(front._mixed())
                    return replace(behind._planned(), cancels=cancels)
                return None if front is None else replace(front._planned(exact=True), keeps=False)
        return None

    def _settle(self) -> None:
        """Measure, until every call accounts for its parameters or is set aside."""
        while True:
            self.structure = Structure(self.traced, self.aside)
            self.couplings = self._couplings()
            self._measure()
            self.silent = self._silent()
            self.spoken = set(range(len(self.traced.order))) - self.silent
            self.shared = self._shared()
            self.arranged = self._arrange_calls()
            self.border = self._border()
            apart = self._not_of_all()
            more = self._unaccounted() - self.settled
            if not on_any(self.group, bool(more or apart), self.losses.device):
                break
            self.aside ^= more
            self.settled |= more

    # -- measuring ---------------------------------------------------------------------------------------------

    def _measure(self) -> None:
        """Find the owners of the outputs of all nodes that are of interest."""
        positions = self.structure.looked_at
        if self.n == 1 and self.group is None:  # all there is belongs to the one example
            self.nodes, self.calls = self._of_one(positions)
            return
        question = Question(self.traced, self.losses, self.seed, self.couplings, self.through | self.own, self.group)
        question.ask(positions, edges=self._meeting(positions), cancelling=self.behind)
        suspects = self._suspects(question.nodes)
        if self.by_element and on_any(self.group, bool(suspects), self.losses.device):
            question.ask(suspects, by_element=True, cancelling=self.behind)
        self.nodes, self.calls, self.blind = question.nodes, question.calls, question.blind
        self.edges, self.drowned = question.edges, question.drowned

    def _meeting(self, positions: Collection[int]) -> dict[int, list[int]]:
        """The inputs (slots), by node, of the edges that end where others end too, where zeros may part them."""
        ends: dict[tuple[int, int], list[Key]] = {}
        for position, node in enumerate(self.traced.order):
            for slot, child in enumerate(self.traced.children[position]):
                if child is None:
                    continue
                if self.structure.is_input(child) if child < 0 else child in positions and self.structure.trains[child]:
                    ends.setdefault((child, node.next_functions[slot][1]), []).append((position, slot))
        found: dict[int, list[int]] = {}
        for edges in ends.values():
            for position, slot in edges if len(edges) > 1 else ():
                found.setdefault(position, []).append(slot)
        return found

    def _parted_by_zeros(self, routed: Collection[int]) -> bool:
        """Whether examples may come to lie otherwise, in what several nodes read, if other rows have a gradient."""
        for (position, slot), owners in self.edges.items():
            child = self._child(position, slot)
            if child in self.shared or position in self.shared or position in self.silent:  # silent ones are watched
                continue
            whole = self.nodes.get((child, self.traced.order[position].next_functions[slot][1]))
            if whole is None or not self.about.regular(whole):
                return True
            if self._tells(position, slot):
                if self._hides(position, position in routed):
                    return True
            elif not self.about.regular(owners):
                return True
        return False

    def _tells(self, position: int, slot: int) -> bool:
        """Whether the rows of a node's own outputs tell whose the rows are that it passes no gradient on to."""
        node = self.traced.order[position]
        name = operator_name(node)
        return name in MOVING or (
            name in ELEMENTWISE and entering_shape(*node.next_functions[slot]) == output_shape(node)
        )

    def _closed_to_others(self) -> bool:
        """Whether a row that a node passes no gradient on to would get one of another example than its own.

        A factor of zero or a maximum that lies elsewhere closes it for now. The rows of the node's own outputs may tell
        whose gradient it would be.
        """
        for position, node in enumerate(self.traced.order):
            name = operator_name(node)
            moves = (name in MOVING or name in HANDING_ON) and name not in CHOOSING
            if moves or position in self.shared or position in self.silent:
                continue
            for slot, child in enumerate(self.traced.children[position]):
                if child is None or child in self.shared or not self.structure.trained_behind(child):
                    continue
                whole = self.nodes.get((child, node.next_functions[slot][1]))
                if whole is None or not ((position, slot) in self.edges or self.about.present(whole).nobody):
                    continue
                if self._chooses_among(node, whole) if name in CHOOSING else self._disagrees(position, slot, whole):
                    return True
        return False

    def _chooses_among(self, node: Any, whole: Tensor) -> bool:
        """Whether a node picks one of the elements of different examples."""
        along: Any = saved_option(node, "dim")
        dims = along if isinstance(along, tuple) else () if along is None else (along,)
        rank = len(entering_shape(*node.next_functions[0]))
        return bool(self.about.varying(whole) & ({dim % max(rank, 1) for dim in dims} or set(range(rank))))

    def _disagrees(self, position: int, slot: int, whole: Tensor) -> bool:
        """Whether a node has a row of another example than the row that it reads, or that cannot be told.

        Nodes that treat every element apart, and those that repeat rows, are compared as broadcasting goes; others, by
        which rows of different examples are not combined, along the leading dimensions that their output has too.
        """
        node = self.traced.order[position]
        own = self.nodes.get((position, 0))
        if own is None or None in self.traced.shapes[position]:
            return own is not None
        whole = self._as_arranged(whole)
        name = operator_name(node)
        if name in ELEMENTWISE or name in ("Expand", "Repeat"):
            rank, given = len(output_shape(node)), len(entering_shape(*node.next_functions[slot]))
            own = own.view([*own.shape, *[1] * (rank - own.dim())])
            whole = whole.view([*[1] * (rank - given), *whole.shape, *[1] * (given - whole.dim())])
            if any(a not in (b, 1) and b != 1 for a, b in zip(whole.shape, own.shape, strict=True)):
                return True
        else:
            shared = [a == b for a, b in zip(own.shape, whole.shape, strict=False)]
            dims = shared.index(False) if False in shared else len(shared)
            found = [rows.reshape(*rows.shape[:dims], -1) for rows in (own, whole)]
            own, whole = (rows.amax(-1) for rows in found)
            for rows, one in zip(found, (own, whole), strict=True):
                if not bool(((rows == one.unsqueeze(-1)) | (rows == NOBODY)).all()):
                    return True
        return bool(((own != whole) & (own != NOBODY) & (whole != NOBODY)).any())

    def _as_arranged(self, owners: Tensor) -> Tensor:
        """Owners of rows, with those that no gradient comes to and of which their arrangement tells."""
        arrangement = self.about.arranged(owners)
        if not isinstance(arrangement.ownership, Layout):
            return owners
        whole = self._laid_out(arrangement.ownership, owners)
        # What is not known is watched.
        return whole if arrangement.unknown is None else torch.where(arrangement.unknown, NOBODY, whole)

    def _laid_out(self, layout: Layout, owners: Tensor) -> Tensor:
        """The owners of all rows by a layout, whether or not a gradient came to them."""
        of = owners_of(layout, tuple(owners.shape), self.n, owners.device).of
        return of.view([*of.shape, *[1] * (owners.dim() - of.dim())]).expand_as(owners)

    def _hides(self, position: int, by_routes: bool) -> bool:
        """Whether nothing tells whose some rows of a node's outputs are, or to whom they would be routed."""
        gaps = self._gaps(position)
        if not gaps or self._is_cut(position):
            return False
        return by_routes or not all(self.about.regular(owners) for owners in gaps)

    def _gaps(self, position: int) -> list[Tensor]:
        """The owners of those outputs of a node of which some rows got no gradient."""
        numbers = range(len(node_outputs(self.traced.order[position])))
        found = (self.nodes.get((position, number)) for number in numbers)
        return [owners for owners in found if owners is not None and self.about.present(owners).nobody]

    def _is_cut(self, position: int) -> bool:
        """Whether the rows of a node without a gradient are those that no other node reads, whatever the data."""
        parents = self.structure.parents[position]
        return bool(parents) and all(
            operator_name(self.traced.order[parent]) in MOVING and (not self._gaps(parent) or self._is_cut(parent))
            for parent in parents
        )

    def _of_one(self, positions: Collection[int]) -> tuple[dict[Key, Tensor], dict[int, list[Tensor]]]:
        nodes = {}
        for position in positions:
            for number, output in enumerate(node_outputs(self.traced.order[position])):
                shape = tuple(output.shape) if not output.is_nested_tensor else ()
                nodes[position, number] = torch.zeros(shape[:1], dtype=torch.long, device="cpu")
        calls = {
            number: [torch.zeros(call.batch, dtype=torch.long, device="cpu")]
            for number, call in enumerate(self.traced.calls)
            if self.traced.seen_by_collector(number)
        }
        return nodes, calls

    def _suspects(self, nodes: Mapping[Key, Tensor]) -> set[int]:
        """Nodes of which some row looks like one of several, though what lies below is the examples' own.

        The examples may lie along the last dimension, or numbers may be too small to be told apart by powers of two.
        """
        mixed = {position for (position, _), owners in nodes.items() if self.about.present(owners).several}
        apart = {position for (position, _), owners in nodes.items() if self.about.present(owners).apart}
        owned: list[bool] = []
        for position, children in enumerate(self.traced.children):
            own = position in apart - mixed
            owned.append(own or any(owned[child] for child in children if child is not None and child >= 0))
        # What clips every element by itself makes rows look mixed in which nothing tells of the examples' data. And a
        # node with rows of one example beside rows of several may have them along its last dimension.
        all_of_them = self.traced.hooked or any(map(is_users, self.traced.order)) or not apart.isdisjoint(mixed)
        return {
            p
            for p in mixed
            if self.structure.trains[p]
            and (all_of_them or owned[p] or self.structure.reads_data(p, self.model, self.n) is not None)
        }

    def _couplings(self) -> tuple[int, ...]:
        """Positions of batch norms outside of calls that take their statistics from the batch."""
        found = []
        for position, node in enumerate(self.traced.order):
            if position in self.through | self.own:
                continue
            if operator_name(node) in BATCH_NORMS and not self.structure.calls_around(position):
                called = self.structure.called_batch_norm(position)  # and is aside
                statistics = None if called else batch_norm_statistics(node)
                if statistics is not None and statistics[2] and output_shape(node)[0] % self.n == 0:
                    found.append(position)
        return tuple(found)

    # -- what is shared ----------------------------------------------------------------------------------------

    def _shared(self) -> set[int]:
        """Positions of nodes in which several examples have a share, and of all below them that they reach.

        A factor of zero, as in ``losses + 0 * unused.sum()``, lets no gradient pass: what is behind it is shared by
        nobody for now, and is watched.
        """
        mixed = self._mixed()
        mixed |= {position for position, pure in enumerate(self.structure.pure) if pure}
        for position in self.through:  # what is normalised by its own statistics
            mixed |= {c for c in self.traced.children[position] if c is not None and c >= 0}
        return self.structure.below(mixed, self.spoken - (self._apart() - mixed))

    def _mixed(self) -> set[int]:
        """Positions of nodes that made a row of several examples."""
        mixed = {position for (position, _), owners in self.nodes.items() if self.about.present(owners).several}
        for number, parts in self.calls.items():
            if any(self.about.present(owners).several for owners in parts) and number not in self.aside:
                mixed.add(self.traced.positions[self.traced.nodes[number]])
        return mixed

    # -- what is behind it ---------------------------------------------------------------------------------------

    def _may_look_behind(self) -> bool:
        """Whether rounding is small enough to tell what cancels from what does not, and one process tells."""
        narrow = {torch.float16, torch.bfloat16} & set(self.traced.dtypes)
        return self.n > 1 and self.group is None and not narrow

    def _couples(self) -> bool:
        """Whether the examples' data lie behind what enters."""
        apart, behind = self._calls_apart(), (self._child(*edge) for edge in self.border)
        read = (self.structure.reads_data(c, self.model, self.n, apart, self.shared) for c in behind if c >= 0)
        return any(number is not None for number in read)

    def _apart(self) -> set[int]:
        """Positions of the nodes whose rows are of one example each, so that they are owned wherever they lie."""
        if not self.behind:
            return set()
        return {position for position, _ in self.nodes} & self.spoken - self._mixed()

    def _meets_again(self) -> bool:
        """Whether some parameter behind a shared tensor is behind owned rows behind it too, for which others account.

        What is pulled back to the parameter would count these twice.
        """
        for child in {self._child(*edge) for edge in self.border}:
            inside = self.structure.below([child] if child >= 0 else [], self.shared)
            ends = {end for position in inside for end in self.traced.children[position] if end in self.spoken}
            entering = {source.parameter for source in self.structure.sources(child, self.shared)}
            again = (s for end in ends - self.shared for s in self.structure.sources(end, self.spoken))
            if any(source.parameter in entering for source in again):
                return True
        return False

    def _arrange_calls(self) -> dict[int, Arrangement | None]:
        """Where the examples lie in the calls that account for their parameters; None where no gradient came."""
        found: dict[int, Arrangement | None] = {}
        for number, call in enumerate(self.traced.calls):
            position = self.traced.positions[self.traced.nodes[number]]
            if number in self.aside or position in self.shared:
                continue
            parts = self._parts(number, position)
            owners = None if not parts else agreed(parts)
            blind = self._blind_rows(number, position)
            if owners is None or not (blind is not None or self.about.present(owners).anybody):
                found[number] = None
                continue
            if not call.rule.whole_call and call.rule.misses_batch(
                call.module, torch.empty((1,) * len(call.shape), device="meta")
            ):
                found[number] = Arrangement(Owners(owners, self.n))
                if not call.rule.positionwise or owners[owners != NOBODY].unique().numel() == 1:
                    found[number] = Arrangement(Owners(self._only_owner(call, owners), self.n))
            else:
                found[number] = self.about.arranged(owners, blind)
        return found

    def _blind_rows(self, number: int, position: int) -> Tensor | None:
        key: Any = (
            ("call", number)
            if self.traced.seen_by_collector(number)
            else (position, self.traced.calls[number].output_nr)
        )
        found = [rows for other, rows in self.blind.items() if other[:2] == key]
        return found[0] if found else None

    def _only_owner(self, call: Call, owners: Tensor) -> Tensor:
        """The example that a layer without a dimension of examples was called on, 0-dimensional."""
        present = owners[owners != NOBODY].unique()
        if present.numel() > 1:
            raise RefusedError(
                f"engm: layer '{call.name}' ({type(call.module).__name__}) was called without a batch dimension (its "
                f"output has shape {tuple(call.shape)}), so there are no examples in it. Give it x.unsqueeze(0)."
            )
        return present[0]

    def _parts(self, number: int, position: int) -> list[Tensor]:
        if self.traced.seen_by_collector(number):
            return self.calls.get(number, [])
        owners = self.nodes.get((position, self.traced.calls[number].output_nr))
        return [] if owners is None else [owners]

    def _unaccounted(self) -> set[int]:
        """Calls that are to be set aside, or that are to come back, before the border is what it has to be."""
        found: set[int] = set()
        for number, arrangement in self.arranged.items():
            call = self.traced.calls[number]
            if arrangement is not None and not fits(call, arrangement.ownership):
                found.add(number)
            position = self.traced.positions[self.traced.nodes[number]]
            extent = self._is_of(position, number) if call.couples and arrangement is not None else None
            if extent is not None:
                if extent is Extent.PART:
                    self._refuse_coupling(number)
                (self.own if extent is Extent.ONE else self.through).add(position)
                found.add(number)
        for position, slot in self.border:
            around = [k for k in self.structure.calls_around(position) if k not in found]
            if self.structure.covered(position, slot, self.shared) is None or (
                around and position in self.structure.inner
            ):
                found |= set(around)
        lost = self._lost_in_regions()
        for number in self.aside:
            call = self.traced.calls[number]
            if lost and call.rule.generic and any(id(p) in lost for p in call.parameters.values()):
                found.add(number)
        return found

    def _lost_in_regions(self) -> set[int]:
        """Ids of the parameters that compiled regions use beside their layers."""
        return {
            source.parameter
            for position, slot in self.border
            if is_compiled_region(self.traced.order[position])
            for source in self.structure.sources(self._child(position, slot), self.shared)
        }

    def _not_of_all(self) -> set[int]:
        """Positions of batch norms outside of calls that turn out not to be of the whole batch, which is noted."""
        found = {position: extent for position in self.couplings if (extent := self._is_of(position)) is not None}
        for position, extent in found.items():
            (self.own if extent is Extent.ONE else self.through).add(position)
        return set(found)

    def _is_of(self, position: int, number: int | None = None) -> Extent | None:
        """What the statistics of a batch norm are of; None for the whole batch, and where that cannot be told.

        Args:
            position: of the node.
            number: of the call that it is, if it is one.
        """
        found = [self.nodes.get((position, 0))] if number is None else self._parts(number, position)
        owners = found[0] if found else None
        if owners is None or (self.group is not None and self.n == 1):
            return None
        arrangement = self.about.arranged(owners)
        if isinstance(arrangement.ownership, Layout):
            owners = self._laid_out(arrangement.ownership, owners)
        channels = owners.unsqueeze(0) if owners.dim() == 1 else owners.movedim(1, 0).flatten(1)
        ordered = channels.sort(1).values
        examples = (ordered[:, 1:] != ordered[:, :-1]).sum(1) + (ordered[:, 0] != NOBODY)  # by channel
        if bool((channels < 0).any()):
            # An example whose loss is a constant has no rows anywhere: the batch is that of the others.
            return Extent.PART if number is not None and int(examples.max()) < self._in_calls() else None
        if int(examples.max()) <= 1:
            return Extent.ONE
        return Extent.PART if int(examples.min()) < self.n else None

    def _in_calls(self) -> int:
        """How many examples have rows in the outputs of captured calls."""
        positions = (self.traced.positions[node] for node in self.traced.nodes)
        found = [part.flatten() for number, position in enumerate(positions) for part in self._parts(number, position)]
        return int((torch.cat(found).unique() >= 0).sum()) if found else 0

    def _child(self, position: int, slot: int) -> int:
        child = self.traced.children[position][slot]
        assert child is not None
        return child

    def _border(self) -> list[tuple[int, int]]:
        """``(position, slot)`` of the edges by which something enters that no call accounts for."""
        found = []
        reached = self.structure.training(self.shared)
        for position, children in enumerate(self.traced.children):
            if position in self.shared or position in self.silent:
                continue
            for slot, child in enumerate(children):
                if child is None or not (reached[child] if child >= 0 else self.structure.trained_behind(child)):
                    continue
                if (child < 0 or child in self.shared) and self.structure.covered(
                    position, slot, self.shared
                ) is not True:
                    found.append((position, slot))
        return found

    def _silent(self) -> set[int]:
        """Positions of the nodes that no gradient comes to."""
        spoken: set[int] = set()
        for (position, _), owners in self.nodes.items():
            if self.about.present(owners).anybody:
                spoken.add(position)
        for key in self.blind:
            spoken.add(self.traced.positions[self.traced.nodes[key[1]]] if key[0] == "call" else key[0])
        for number, parts in self.calls.items():
            if any(self.about.present(owners).anybody for owners in parts):
                spoken.add(self.traced.positions[self.traced.nodes[number]])
        return self.structure.looked_at - spoken

    # -- the plan ----------------------------------------------------------------------------------------------

    def _planned(self, exact: bool = False) -> Plan:
        """The plan.

        Args:
            exact: take the gradients of all losses through what looks like a coupling, whatever the model says.
        """
        entries, unknown_of_nodes = [], {}
        coupled, apart = False, self._calls_apart()
        for position, slot in self.border:
            child = self._child(position, slot)
            reading = None if child < 0 else self.structure.reads_data(child, self.model, self.n, apart, self.shared)
            if reading is not None:
                if not exact:
                    self._refuse_coupling(reading, position)
                coupled = True
            entry, unknown = self._entry(position, slot)
            entries.append(entry)
            if unknown is not None:
                unknown_of_nodes[position] = unknown.to(self.losses.device)
        layouts = tuple(self._layout_of(number) for number in range(len(self.traced.calls)))
        unknown_of_calls = {
            number: arrangement.unknown.to(self.losses.device)
            for number, arrangement in self.arranged.items()
            if arrangement is not None and arrangement.unknown is not None
        }
        outermost = self._outermost()
        positions = {entry.position for entry in entries} | outermost
        frozen = [
            number
            for number, call in enumerate(self.traced.calls)
            if call.couples
            and self.traced.positions[self.traced.nodes[number]] not in self.shared | self.through | self.own
        ]
        couplings = tuple(position for position in self.couplings if position not in self.shared)
        sinks = sinks_of(self.traced, layouts, positions)
        routes, keeps = self._routes()
        opaque, watchable = self._opaque()
        found = [*layouts, *(entry.layout for entry in entries)]
        irregular = unknown_of_calls or unknown_of_nodes or any(isinstance(layout, Owners) for layout in found)
        keeps = (
            keeps
            and not self.behind
            and watchable
            and not self.traced.hooked
            and not self.blind
            and not (irregular and self._some_unseen())
            and not self._parted_by_zeros({route.position for route in routes})
            and not self._closed_to_others()
        )
        return Plan(
            layouts=layouts,
            entries=tuple(entries),
            sinks=sinks,
            couplings=couplings,
            through=tuple(sorted(self._through_all())),
            couples=bool(frozen or couplings),
            of_all_ranks=self.traced.synchronised,
            coupled=coupled,
            opaque=tuple(opaque),
            routes=tuple(routes),
            keeps=keeps,
            blind=bool(self.blind),
            silent=tuple(sorted(outermost)),
            behind_entries=not self._behind_entries().isdisjoint(position for position, _ in sinks),
            quiet=frozenset(self.silent),
            silent_calls=frozenset(
                number
                for number, arrangement in self.arranged.items()
                if arrangement is None and self.traced.nodes[number] in self.traced.tokens
            ),
            unknown_of_calls=unknown_of_calls,
            unknown_of_nodes=unknown_of_nodes,
            junctions=self._junctions() if keeps else {},
        )

    def _behind_entries(self) -> set[int]:
        """The nodes behind the edges by which something enters."""
        return self.structure.below(child for edge in self.border if (child := self._child(*edge)) >= 0)

    def _junctions(self) -> dict[Key, Junction]:
        """Outputs in which rows come up more than once, or that read what others read, if some had no gradient."""
        found: dict[Key, Junction] = {}
        meeting, skip = {position for position, _ in self.edges}, self.shared | self.structure.no_inputs
        for (position, number), owners in self.nodes.items():
            if position in self.shared or position in self.silent or not self.structure.trains[position]:
                continue
            if not self.about.present(owners).nobody or self._accounts_for(position):
                continue
            if position in meeting or repeats_rows(self.traced, position, skip):
                arrangement = self.about.arranged(owners)
                if arrangement.unknown is not None:
                    unknown = arrangement.unknown.to(self.losses.device)
                    by_index = operator_name(self.traced.order[position]) in PICKING
                    found[position, number] = Junction(arrangement.ownership, unknown, by_index)
        return found

    def _accounts_for(self, position: int) -> bool:
        """Whether a node made the output of a call whose rows without a gradient are known of."""
        return any(self.arranged.get(number) is not None for number in self.structure.calls_at.get(position, ()))

    def _calls_apart(self) -> set[int]:
        """Numbers of the calls of which some rows are of one example and others of another."""
        found = set()
        for number, node in enumerate(self.traced.nodes):
            parts = self._parts(number, self.traced.positions[node])
            if parts and any(part[part >= 0].unique().numel() > 1 for part in parts):
                found.add(number)
        return found

    def _some_unseen(self) -> bool:
        """Whether some examples have no rows, so that nothing tells where they would lie."""
        last = len(self.traced.order) - 1
        owners = [owners for (position, _), owners in self.nodes.items() if position != last]
        owners += [part for parts in self.calls.values() for part in parts]
        seen = torch.cat([part.flatten() for part in owners]).unique()
        return int((seen >= 0).sum()) < self.n

    def _through_all(self) -> set[int]:
        """Batch norms whose statistics are not constants: of a part of the batch, or below a coupling."""
        below = {
            self.traced.positions[node]
            for call, node in zip(self.traced.calls, self.traced.nodes, strict=True)
            if call.couples and self.traced.positions[node] in self.shared
        }
        return self.through | self.own | below

    def _routes(self) -> tuple[list[Route], bool]:
        if self.n == 1 and self.group is None:
            return [], True
        skip = self.shared | self.silent | self.structure.no_inputs
        return routes_of(self.traced, self.structure, self.nodes, skip, self.about)

    def _opaque(self) -> tuple[list[OpaqueFunction], bool]:
        """Functions of the user's on the way, and whether all of them can be watched."""
        if self.n == 1 and self.group is None:
            return [], True

        def where(position: int, number: int) -> Ownership | None:
            found = self._arranged_output(position, number)
            return None if found is None else self._on_device(found.ownership)

        return opaque_functions(self.traced, self.structure, where, self.shared | self.silent)

    def _layout_of(self, number: int) -> Ownership | None:
        arrangement = self.arranged.get(number)
        return None if arrangement is None else self._on_device(arrangement.ownership)

    def _outermost(self) -> set[int]:
        """The nodes without a gradient, behind which there is something to train, that others pass gradients to."""
        return {
            position
            for position in self.silent
            if self.structure.trains[position]
            and position not in self.shared
            and any(parent not in self.silent for parent in self.structure.parents[position])
        }

    def _entry(self, position: int, slot: int) -> tuple[PlannedEntry, Tensor | None]:
        """The entry of what enters by an edge, and the rows of the node's first output that are not known."""
        traced, node = self.traced, self.traced.order[position]
        found = [self._arranged_output(position, number) for number in range(len(node_outputs(node)))]
        first = found[0]
        others = tuple(None if a is None else self._on_device(a.ownership) for a in found[1:])
        child, number = node.next_functions[slot]
        behind, turns = self._child(position, slot), 0
        while operator_name(node) in ("Mm", "Addmm") and behind >= 0 and operator_name(child) == "T":
            if traced.hooked and is_hooked(child):
                break  # what comes out of the hook is the transpose's
            child, number = child.next_functions[0]
            behind, turns = self._child(behind, 0), turns + 1
        entry = PlannedEntry(
            position,
            slot,
            entering_shape(child, number),
            PLAIN if first is None else self._on_device(first.ownership),
            others,
            turns,
            tuple(self.structure.sources(behind, self.shared)),
        )
        ruled = has_rule(entry.at(traced, self.n))
        return replace(entry, ruled=ruled), None if first is None else first.unknown

    def _arranged_output(self, position: int, number: int) -> Arrangement | None:
        owners = self.nodes.get((position, number))
        if position == len(self.traced.order) - 1:
            return Arrangement(PLAIN)
        return None if owners is None else self.about.arranged(owners, self.blind.get((position, number)))

    # -- refusals ----------------------------------------------------------------------------------------------

    def _refuse_coupling(self, number: int, position: int | None = None) -> None:
        """Raise unless couplings are to be computed.

        Args:
            number: of the call nearest to the losses whose output several examples have a share in; -1: an input.
            position: of the node at which the examples meet.
        """
        region = position is not None and is_compiled_region(self.traced.order[position])
        if self.model.coupled == "exact" and not region:
            return
        call = self.traced.calls[number] if number >= 0 else None
        what = (
            "an input that requires grad"
            if call is None
            else (f"the output of layer '{call.name}' ({type(call.module).__name__})")
        )
        where = "" if position is None else f" They meet in {node_name(self.traced.order[position])}"
        if region:  # takes no example's gradient apart
            where += (
                ", a region made by torch.compile: leave what mixes them uncompiled (torch.compiler.disable) to be "
                "told which operator it is, and for coupled='exact'"
            )
        where += "." if where else ""
        raise RefusedError(
            f"engm: {what} for some examples influences the losses of other examples, so that a loss is not its own "
            f"example's alone.{where} Something between this layer and the losses mixes the batch (x - x.mean(0), a "
            "batch statistic outside nn.BatchNorm or over a part of the batch, losses of pairs, a gradient clipped by "
            "its norm over the batch in a hook or a torch.autograd.Function). Replace it, or wrap with "
            "GradNormModule(net, coupled='exact'), which takes the gradients of all losses through it: right, and as "
            "slow as one backpropagation an example from there on. Rows that are no example's but shared by all, as "
            "prompts or class names, count for the examples' if there are n, or a multiple: make them a buffer of the "
            "network."
        )

    def _refuse_regions(self) -> None:
        """Parameters that a compiled region uses beside its layers cannot be seen, nor how it couples examples."""
        apart, last = self._calls_apart(), len(self.traced.order) - 1
        for number in self.structure.calls_at.get(last, ()):
            if any(self.about.present(owners).several for owners in self.calls.get(number, ())):
                self._refuse_coupling(number, last)  # in front of which there is nowhere to tell the examples apart
        for position, slot in self.border:
            child = self._child(position, slot)
            if child >= 0 and is_compiled_region(self.traced.order[position]):
                reading = self.structure.reads_data(child, self.model, self.n, apart, self.shared)
                if reading is not None:
                    self._refuse_coupling(reading, position)
        lost = {self.names[parameter] for parameter in self._lost_in_regions()}
        if lost:
            raise RefusedError(region_message(", ".join(f"'{name}'" for name in sorted(lost)[:5])))


def account_by_operators(calls: Sequence[Call]) -> set[int]:
    """Numbers of the calls whose parameters are accounted for where they enter, inside of the call.

    These are the calls of the generic rule. What goes on inside is cheaper than to run a module again, and goes where a
    module draws random numbers. The rule is for compiled regions, into which nobody sees.
    """
    return {number for number, call in enumerate(calls) if call.rule.generic}


def refuse_hidden_layers(traced: Trace) -> None:
    """No part of the graph may hide the layers inside.

    Raises:
        RuntimeError: names what hides them.
    """
    hidden = [name for name in map(node_name, traced.order) if name.startswith("CheckpointFunction")]
    if hidden:
        raise RefusedError(
            f"engm: the losses run through {hidden[0]}, torch.utils.checkpoint with use_reentrant=True, which hides "
            "the layers inside from the graph. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )


def check_parameters(traced: Trace) -> None:
    """The graph must be of the model's own parameters. A parameter that was replaced since has a gradient of 0.

    Raises:
        RuntimeError: the forward pass ran with other tensors in the place of all of them.
    """
    if any(id(parameter) in traced.leaves for _, parameter in traced.trained):
        return
    used = [(call, key, p) for call in traced.own for key, p in call.parameters.items() if p.requires_grad]
    if not traced.trained or not used:
        return
    call, key, parameter = used[0]
    if own_parameters(call.module).get(key) is not parameter:
        name = f"{call.name}.{key}" if call.name else key
        raise RefusedError(
            f"engm: the forward pass behind these losses ran with other tensors than the model's parameters, such as "
            f"'{name}' (torch.func.functional_call, or they were replaced since), and norms are taken over the model's "
            "own. Copy the values into them, or run the forward pass again."
        )


def region_message(shown: str) -> str:
    """What to say of parameters that a compiled region uses beside its layers."""
    return (
        f"engm: a region made by torch.compile uses {shown} outside of layer calls that were captured, so their "
        "per-example gradients cannot be seen. If the network was compiled and called before it was wrapped, call "
        "torch.compiler.reset() once. If these parameters are used directly (a class token, "
        "F.linear(x, layer.weight), a table of positions, a layer without a rule, a branch of torch.cond), leave that "
        "part uncompiled with torch.compiler.disable, or freeze them."
    )
