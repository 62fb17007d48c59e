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

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from .._C import is_hooked
from ..capture.calls import Call, Wrapper
from ..checks import RefusedError
from ..distributed import on_any
from ..rules.entries import has_rule
from ..terms.layout import PLAIN
from ..terms.owners import NOBODY, Owners, Ownership
from ..torch_internals import (
    BATCH_NORMS,
    batch_norm_statistics,
    entering_shape,
    is_compiled_region,
    node_outputs,
    operator_name,
    output_shape,
    recomputed_once,
)
from .arrangement import Arrangement, Arrangements
from .believed import run_otherwise
from .fitting import OwnersOnDevice, agreed, fits
from .keeping import (
    closed_to_others,
    junctions,
    moved_unseen,
    owners_by_readers,
    parted_by_zeros,
    permutation_of,
    stands_alone,
)
from .measured import Extent, View, measured
from .opaque import opaque_functions, refuse_hidden_passes
from .owners import Key
from .plan import Junction, OpaqueFunction, Plan, PlannedEntry, Route, sinks_of
from .refusals import check_parameters, refuse_coupling, refuse_hidden_layers, refuse_lost_in_regions
from .routing import routes_of
from .structure import Structure
from .trace import Trace


def make_plan(
    model: Wrapper, traced: Trace, losses: Tensor, seed: float = 1.0, cancels: bool = False, once: bool = False
) -> Plan:
    """The plan of a graph.

    Args:
        model: the wrapper whose losses they are.
        traced: the graph.
        losses: ``[n]``.
        seed: what losses are multiplied by in backward passes (a loss scale for float16).
        cancels: shares of other examples cancelled in graphs of the same skeleton, so look there at once.
        once: the plan is for this graph alone, so that it is of no interest for which others it would hold.

    Raises:
        RuntimeError: the examples influence each other and the model refuses that, or a parameter is used where its
            per-example gradients cannot be told; names the layer or the parameter, and says what to do.
    """
    refuse_hidden_layers(traced)
    check_parameters(traced)
    refuse_hidden_passes(traced, losses, seed)
    with recomputed_once():
        return _made_plan(model, traced, losses, seed, cancels, once)


def _made_plan(model: Wrapper, traced: Trace, losses: Tensor, seed: float, cancels: bool, once: bool) -> Plan:
    """The plan of a graph, see :func:`make_plan`, which nothing hidden was found in."""
    found = _plan_behind(model, traced, losses, seed) if cancels else None
    if found is None:
        front = _Planner(model, traced, losses, seed)
        looks = front.may_look_behind() and front.couples()
        found = _plan_behind(model, traced, losses, seed, front) if looks else None
        found = front.planned(once=once) if found is None else found
    return found


def _plan_behind(
    model: Wrapper, traced: Trace, losses: Tensor, seed: float, front: _Planner | None = None
) -> Plan | None:
    """The plan if the examples' data lie behind shared nodes in rows of one example each, else None.

    Args:
        model: as in :func:`make_plan`.
        traced: the same.
        losses: the same.
        seed: the same.
        front: knows how it looks from the front.
    """
    for by_element in (False, True):  # the examples may lie along the last dimension
        with suppress(RefusedError):  # what is refused otherwise is told as it looks from the front
            behind = _Planner(model, traced, losses, seed, behind=True, by_element=by_element)
            if behind.couples():
                continue
            if not (behind.rows.drowned or behind.meets_again()):
                cancels = front is None or not behind.rows.apart.isdisjoint(front.rows.mixed)
                return replace(behind.planned(), cancels=cancels)
            return None if front is None else replace(front.planned(exact=True), keeps=False)
    return None


class _Planner:
    """What was measured of a graph, such that every call accounts for its parameters or is set aside.

    Args:
        model, traced, losses, seed: as in :func:`make_plan`.
        behind: whether rows behind shared nodes may be owned.
        by_element: whether rows that look like rows of several are asked again, element by element.

    Raises:
        RuntimeError: see :func:`make_plan`.
    """

    def __init__(
        self,
        model: Wrapper,
        traced: Trace,
        losses: Tensor,
        seed: float,
        *,
        behind: bool = False,
        by_element: bool = True,
    ) -> None:
        self.model, self.traced, self.losses, self.seed = model, traced, losses, seed
        self.n = losses.shape[0]
        self.group = traced.group
        self.behind, self.by_element = behind, by_element
        self.disbelieved = run_otherwise(traced)
        self.aside = account_by_operators(traced.calls) | self.disbelieved
        self.settled: set[int] = set()  # calls that were set aside, or brought back, and stay so
        self.through: set[int] = set()  # positions of batch norms of a part of the batch
        self.own: set[int] = set()  # positions of batch norms of one example, or of one for each channel
        self.seemed: set[int] = set()  # those of them that seem so, as far as rows have a gradient
        self.of_all: set[int] = set()  # those that seemed so and are not
        # Other processes, whose examples may be many, would not measure again with this one.
        self.alone = self.n == 1 and self.group is not None and not traced.synchronised
        if self.alone:
            coupling = {number for number, call in enumerate(traced.calls) if call.couples}
            self.own |= {traced.places[number] for number in coupling}
            self.aside |= coupling
            self.settled |= coupling
        self._on_device = OwnersOnDevice(losses.device)
        self.about = Arrangements(losses)
        self._settle()
        self._refuse_regions()

    def _settle(self) -> None:
        """Measure, until every call accounts for its parameters or is set aside."""
        while True:
            self.structure = Structure(self.traced, frozenset(self.aside), frozenset(self.disbelieved))
            self.couplings = self._couplings()
            through, own, called = frozenset(self.through), frozenset(self.own), frozenset(self._called_otherwise())
            view = View(self.couplings, through, own, self.behind, self.by_element, called)
            self.rows = measured(self.model, self.structure, self.losses, self.seed, view, self.about)
            self.arranged = self._arrange_calls()
            self.border = self._border()
            changed = self._take_back() or bool(self._not_of_all())
            more = self._unaccounted() - self.settled
            if not on_any(self.group, bool(more) or changed, self.losses.device):
                break
            self.aside ^= more
            self.settled |= more

    def _couplings(self) -> tuple[int, ...]:
        """Positions of batch norms outside of calls that take their statistics from the batch."""
        found: list[int] = []
        for position, node in enumerate(self.traced.order):
            if position in self.through | self.own:
                continue
            if operator_name(node) in BATCH_NORMS and not self.structure.calls_around(position):
                called = self.structure.called_batch_norm(position)  # and is aside
                statistics = None if called else batch_norm_statistics(node)
                if statistics is not None and statistics[2] and output_shape(node)[0] % self.n == 0:
                    (self.own.add if self.alone else found.append)(position)
        return tuple(found)

    # -- what is behind it ---------------------------------------------------------------------------------------

    def may_look_behind(self) -> bool:
        """Whether rounding is small enough to tell what cancels from what does not, and one process tells."""
        narrow = {torch.float16, torch.bfloat16} & set(self.traced.dtypes)
        return self.n > 1 and self.group is None and not narrow

    def couples(self) -> bool:
        """Whether the examples' data lie behind what enters."""
        behind = (self._child(*edge) for edge in self.border)
        return any(self._reading(child) is not None for child in behind if child >= 0)

    def _reading(self, child: int) -> int | None:
        """The call by which what is shared there reads the examples' data, see :meth:`Structure.reads_data`."""
        return self.structure.reads_data(child, self.model, self.n, self.rows.calls_apart, self.rows.shared)

    def meets_again(self) -> bool:
        """Whether some parameter behind a shared tensor is behind owned rows behind it too, for which others account.

        What is pulled back to the parameter would count these twice.
        """
        for child in {self._child(*edge) for edge in self.border}:
            inside = self.structure.below([child] if child >= 0 else [], self.rows.shared)
            ends = {end for position in inside for end in self.traced.children[position] if end in self.rows.spoken}
            entering = {source.parameter for source in self.structure.sources(child, self.rows.shared)}
            again = (s for end in ends - self.rows.shared for s in self.structure.sources(end, self.rows.spoken))
            if any(source.parameter in entering for source in again):
                return True
        return False

    # -- what calls account for ----------------------------------------------------------------------------------

    def _arrange_calls(self) -> dict[int, Arrangement | None]:
        """Where the examples lie in the calls that account for their parameters; None where no gradient came."""
        found: dict[int, Arrangement | None] = {}
        for number, call in enumerate(self.traced.calls):
            position = self.rows.place_of(number)
            if number in self.aside or position in self.rows.shared:
                continue
            parts = self.rows.parts(number)
            owners = None if not parts else agreed(parts)
            blind = self.rows.blind_rows(number)
            if owners is None or not (blind is not None or self.about.present(owners).anybody):
                found[number] = None
                continue
            without_batch = self._misses_batch(call)
            found[number] = self._of_one(number, owners) if without_batch else self.about.arranged(owners, blind)
        return found

    @staticmethod
    def _misses_batch(call: Call) -> bool:
        """Whether a layer was called on what has no dimension of examples."""
        shape = torch.empty((1,) * len(call.shape), device="meta")
        return not call.rule.whole_call and call.rule.misses_batch(call.module, shape)

    def _of_one(self, number: int, owners: Tensor) -> Arrangement:
        """Where the examples lie in the output of a layer that has no dimension of examples: it is of one alone.

        Whose the elements are that no gradient came to is not known, unless those tell that read them. Where there are
        several owners all the same, the arrangement says so, and the layer does not account for its parameters.
        """
        present = owners[owners != NOBODY].unique()
        if present.numel() > 1:
            return Arrangement(Owners(owners, self.n))
        owner = present[0] if present.numel() else owners.new_zeros(())
        unknown = (owners == NOBODY) & (owners_by_readers(self.rows, number, owners) != owner)
        lost = not present.numel() and self.n > 1  # nothing is finite
        return Arrangement(Owners(owner, self.n), unknown if bool(unknown.any()) else None, lost)

    def _fits(self, call: Call, ownership: Ownership) -> bool:
        """Whether a call's rule can be told that its examples lie like this."""
        if self._misses_batch(call):
            return isinstance(ownership, Owners) and ownership.dims == 0
        return fits(call, ownership)

    def _unaccounted(self) -> set[int]:
        """Calls that are to be set aside, or that are to come back, before the border is what it has to be."""
        found: set[int] = set()
        for number, arrangement in self.arranged.items():
            call = self.traced.calls[number]
            if arrangement is not None and not self._fits(call, arrangement.ownership):
                found.add(number)
            position = self.rows.place_of(number)
            extent = self.rows.extent_of(position, number) if call.couples and arrangement is not None else None
            if extent is not None:
                if extent is Extent.PART:
                    refuse_coupling(self.model, self.traced, number)
                self._note_extent(position, extent)
                found.add(number)
        for position, slot in self.border:
            around = [k for k in self.structure.calls_around(position) if k not in found]
            if self.structure.covered(position, slot, self.rows.shared) is None or (
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
            for source in self.structure.sources(self._child(position, slot), self.rows.shared)
        }

    def _not_of_all(self) -> set[int]:
        """Positions of batch norms outside of calls that turn out not to be of the whole batch, which is noted."""
        extents = {
            position: self.rows.extent_of(position) for position in self.couplings if position not in self.of_all
        }
        for position, extent in extents.items():
            if extent is not None:
                self._note_extent(position, extent)
        return {position for position, extent in extents.items() if extent is not None}

    def _note_extent(self, position: int, extent: Extent) -> None:
        (self.through if extent is Extent.PART else self.own).add(position)
        if extent is Extent.ONE_SEEN:
            self.seemed.add(position)

    def _take_back(self) -> bool:
        """Whether batch norms that seemed to be of one example turn out to mix examples below, which is noted."""
        mixing = {p for p in self.seemed if not self.rows.mixed.isdisjoint(self.traced.children[p])}
        self.seemed -= mixing
        self.own -= mixing
        self.of_all |= mixing
        return bool(mixing)

    def _child(self, position: int, slot: int) -> int:
        child = self.traced.children[position][slot]
        assert child is not None
        return child

    def _border(self) -> list[tuple[int, int]]:
        """``(position, slot)`` of the edges by which something enters that no call accounts for."""
        found = []
        # What is closed behind a shared node may open at a step that shows nothing else for the first time.
        reached = self.structure.training(self.rows.shared | self._closed_branches())
        for position, children in enumerate(self.traced.children):
            if position in self.rows.shared or position in self.rows.silent:
                continue
            for slot, child in enumerate(children):
                if child is None or not (reached[child] if child >= 0 else self.structure.trained_behind(child)):
                    continue
                if (child < 0 or child in self.rows.shared) and self.structure.covered(
                    position, slot, self.rows.shared
                ) is not True:
                    found.append((position, slot))
        return found

    # -- the plan ----------------------------------------------------------------------------------------------

    def planned(self, exact: bool = False, once: bool = False) -> Plan:
        """The plan.

        Args:
            exact: take the gradients of all losses through what looks like a coupling, whatever the model says.
            once: as in :func:`make_plan`.
        """
        entries, unknown_of_nodes, arrangements = [], {}, list(self.arranged.values())
        coupled = False
        for position, slot in self.border:
            child = self._child(position, slot)
            reading = self._reading(child) if child >= 0 else None
            if reading is not None:
                if not exact:
                    refuse_coupling(self.model, self.traced, reading, position)
                coupled = True
            entry, outputs = self._entry(position, slot)
            entries.append(entry)
            arrangements += outputs
            if outputs[0] is not None and outputs[0].unknown is not None:
                unknown_of_nodes[position] = outputs[0].unknown.to(self.losses.device)
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
            and number not in self.disbelieved
            and self.rows.place_of(number) not in self.rows.shared | self.through | self.own
        ]
        couplings = tuple(p for p in self.couplings if p not in self.rows.shared | self.rows.silent)
        sinks = sinks_of(self.traced, layouts, positions)
        routes, keeps = ([], False) if once else self._routes()
        opaque, watchable = ([], False) if once else self._opaque()
        found = [*layouts, *(entry.layout for entry in entries)]
        irregular = unknown_of_calls or unknown_of_nodes or any(isinstance(layout, Owners) for layout in found)
        routed = {route.position for route in routes}
        keeps = (
            keeps
            and not (self.behind or self.seemed)
            and watchable
            and not self.traced.hooked
            and not self.rows.blind
            and not (irregular and self.rows.some_unseen())
            and not parted_by_zeros(self.rows, routed)
            and not closed_to_others(self.rows)
        )
        watched, settled = self._junctions() if keeps else ({}, frozenset())
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
            alone=keeps and stands_alone(self.rows, routed),
            blind=bool(self.rows.blind),
            lost=any(arrangement is not None and arrangement.lost for arrangement in arrangements),
            silent=tuple(sorted(outermost)),
            behind_entries=not self._behind_entries().isdisjoint(position for position, _ in sinks),
            quiet=frozenset(self.rows.silent),
            seen=self._seen() if keeps else {},
            silent_calls=frozenset(
                number
                for number, arrangement in self.arranged.items()
                if arrangement is None and self.traced.nodes[number] in self.traced.tokens
            ),
            unknown_of_calls=unknown_of_calls,
            unknown_of_nodes=unknown_of_nodes,
            junctions=watched,
            settled=settled,
        )

    def _seen(self) -> dict[Key, Ownership | None]:
        """Where the examples lie in the outputs that a gradient came to; None where several have a share."""
        return {
            key: None if key[0] in self.rows.shared else self.about.arranged(owners).ownership
            for key, owners in self.rows.nodes.items()
            if key[0] not in self.rows.silent
        }

    def _junctions(self) -> tuple[dict[Key, Junction], frozenset[int]]:
        """The outputs of which some rows without a gradient are watched; the nodes that move rows as all others lie."""
        device = self.losses.device
        moved, settled = moved_unseen(self.rows, device)
        return junctions(self.rows, self.arranged, device) | moved, settled

    def _behind_entries(self) -> set[int]:
        """The nodes behind the edges by which something enters."""
        return self.structure.below(child for edge in self.border if (child := self._child(*edge)) >= 0)

    def _through_all(self) -> set[int]:
        """Batch norms whose statistics are not constants: of a part of the batch, or below a coupling."""
        below = {
            self.traced.positions[node]
            for call, node in zip(self.traced.calls, self.traced.nodes, strict=True)
            if call.couples and self.traced.positions[node] in self.rows.shared
        }
        return self.through | self.own | below | self._called_otherwise()

    def _called_otherwise(self) -> set[int]:
        """Positions of the outputs of calls of batch norms that are known of by the nodes of these alone."""
        calls = self.traced.calls
        return {self.traced.positions[self.traced.nodes[k]] for k in self.disbelieved if calls[k].couples}

    def _routes(self) -> tuple[list[Route], bool]:
        if self.n == 1 and self.group is None:
            return [], True
        skip = self.rows.shared | self.rows.silent | self.structure.no_inputs
        return routes_of(self.traced, self.structure, self.rows.nodes, skip, self.about)

    def _opaque(self) -> tuple[list[OpaqueFunction], bool]:
        """Functions of the user's on the way, and whether all of them can be watched."""
        if self.n == 1 and self.group is None:
            return [], True

        def where(position: int, number: int) -> Ownership | None:
            found = self.rows.arranged_output(position, number)
            return None if found is None else self._on_device(found.ownership)

        return opaque_functions(self.traced, self.structure, where, self.rows.shared | self.rows.silent)

    def _layout_of(self, number: int) -> Ownership | None:
        arrangement = self.arranged.get(number)
        return None if arrangement is None else self._on_device(arrangement.ownership)

    def _outermost(self) -> set[int]:
        """The nodes without a gradient, behind which there is something to train, that others pass gradients to."""
        return {
            position
            for position in self.rows.silent
            if self.structure.trains[position]
            and position not in self.rows.shared
            and any(parent not in self.rows.silent for parent in self.structure.parents[position])
        }

    def _entry(self, position: int, slot: int) -> tuple[PlannedEntry, list[Arrangement | None]]:
        """The entry of what enters by an edge, and where the examples lie in the node's outputs."""
        traced, node = self.traced, self.traced.order[position]
        found = [self.rows.arranged_output(position, number) for number in range(len(node_outputs(node)))]
        first = found[0]
        others = tuple(None if a is None else self._on_device(a.ownership) for a in found[1:])
        child, number = node.next_functions[slot]
        behind, turns = self._child(position, slot), 0
        while operator_name(node) in ("Mm", "Addmm") and behind >= 0 and permutation_of(child) == [1, 0]:
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
            tuple(self.structure.sources(behind, self.rows.shared | self._closed_branches())),
        )
        ruled = has_rule(entry.at(traced, self.n))
        return replace(entry, ruled=ruled), found

    def _closed_branches(self) -> set[int]:
        """The nodes outside of calls that no gradient comes to; one may by way of every tensor that they lead to."""
        return {p for p in self.rows.silent - self.structure.inner if p not in self.structure.calls_at}

    def _refuse_regions(self) -> None:
        """Parameters that a compiled region uses beside its layers cannot be seen, nor how it couples examples."""
        last = len(self.traced.order) - 1  # in front of which there is nowhere to tell the examples apart
        for number in self.structure.calls_at.get(last, ()):
            if any(self.about.present(owners).several for owners in self.rows.calls.get(number, ())):
                refuse_coupling(self.model, self.traced, number, last)
        for position, slot in self.border:
            child = self._child(position, slot)
            if child >= 0 and is_compiled_region(self.traced.order[position]):
                reading = self._reading(child)
                if reading is not None:
                    refuse_coupling(self.model, self.traced, reading, position)
        names = {id(parameter): name for name, parameter in self.traced.trained}
        refuse_lost_in_regions({names[parameter] for parameter in self._lost_in_regions()})


def account_by_operators(calls: Sequence[Call]) -> set[int]:
    """Numbers of the calls whose parameters are accounted for where they enter, inside of the call.

    These are the calls of the generic rule. What goes on inside is cheaper than to run a module again, and goes where a
    module draws random numbers. The rule is for compiled regions, into which nobody sees.
    """
    return {number for number, call in enumerate(calls) if call.rule.generic}
