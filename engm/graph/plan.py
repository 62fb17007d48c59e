"""The plan of a graph: where the examples lie in every captured call, and where parameters enter outside of calls.

A plan is made from what is measured on one graph (:mod:`engm.graph.planning`) and holds for every graph of the same
structure whose routing has the same values. It is kept in a :class:`PlanCache`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..capture.calls import Call, Collector
from ..rules.entries import Entry
from ..terms import Term
from ..terms.owners import Owners, Ownership
from ..torch_internals import is_recomputed, node_outputs, recomputed_once, saved_tensors_of
from .trace import Trace

MOST_PLANS = 1024  # kept at once; layers that are skipped at random make a new structure at almost every step
RESTLESS = 3  # plans that were made and have not paid off, before the rows of graphs are told in the norm pass
NEW_CHECKS = 16  # structures that are checked when they are met, however many come
APART = 20  # graphs between the checks of further ones
MOST_ROUTINGS = 8  # kept of one structure
CHANGING = 16  # plans of any skeletons that have not paid off, before one is kept of a skeleton met twice alone
STEADY = 8  # graphs that a plan has to hold for, so that it has paid off to measure one


@dataclass(frozen=True)
class Source:
    """A trained parameter that an entering tensor is computed from.

    Attributes:
        parameter: its ``id``.
        rearranged: the entering tensor consists of elements of the parameter, each at most once.
    """

    parameter: int
    rearranged: bool


@dataclass(frozen=True)
class PlannedEntry:
    """Where a shared tensor enters, as positions in :attr:`Trace.order`.

    Attributes:
        position: of the node.
        slot: which input of the node.
        shape: of the entering tensor.
        layout: where the examples lie in the node's first output.
        others: where they lie in the node's further outputs; None for one without a gradient.
        turns: how many transpositions in a row are in between; the entering tensor is the input of the last.
        sources: the parameters behind it.
        ruled: whether its operator has a rule; if not, the operator's own backward is run again.
    """

    position: int
    slot: int
    shape: tuple[int, ...]
    layout: Ownership
    others: tuple[Ownership | None, ...]
    turns: int
    sources: tuple[Source, ...]
    ruled: bool = True

    def waits(self, traced: Trace) -> bool:
        """Whether its term cannot be formed before the backward pass is over, and needs the graph then.

        What the node saved may be recomputed in one graph and not in another of the same structure.
        """
        return not self.ruled or is_recomputed(traced.order[self.position])

    def at(self, traced: Trace, n: int) -> Entry:
        """The entry in a graph of the same structure."""
        node = traced.order[self.position]
        return Entry(node, self.slot, self.shape, self.layout, n, self.turns, self.others)


@dataclass(frozen=True, eq=False)
class Junction:
    """An output of a node in which rows that it reads come up more than once, or are moved, some without a gradient.

    Whose the latter are hangs on nothing that was seen: another place in which the same row comes up may be another's.

    Attributes:
        layout: where the examples lie in it.
        unknown: rows ``[*leading]`` that no gradient came to where nothing else tells whose they are.
        by_index: whether indices tell which rows come up more than once, not dimensions.
        moved: whether it is about where the rows without a gradient are moved to, and not how often they come up.
    """

    layout: Ownership
    unknown: Tensor
    by_index: bool
    moved: bool = False


@dataclass(frozen=True, eq=False)
class Route:
    """Indices, a mask, an order or the like, by which a node moves rows of the examples.

    Attributes:
        position: of the node.
        name: under which the node saved it.
        number: which of several tensors under that name.
        values: what it was when the plan was made.
    """

    position: int
    name: str
    number: int
    values: Tensor

    def holds(self, traced: Trace) -> bool:
        """Whether a graph of the same structure has the same values there."""
        found = saved_tensors_of(traced.order[self.position], self.name)
        if self.number >= len(found):
            return False
        now = found[self.number]
        if now is None:
            return False
        alike = now.shape == self.values.shape and now.device == self.values.device
        return alike and torch.equal(now, self.values)


@dataclass(frozen=True, eq=False)
class OpaqueFunction:
    """A function whose backward is the user's.

    Attributes:
        position: of its node.
        outputs: where the examples lie in each of the node's outputs; None for one without a gradient.
        inputs: by input (slot) that gradients go on from to a parameter, where the examples lie there.
    """

    position: int
    outputs: tuple[Ownership | None, ...]
    inputs: Mapping[int, Ownership]


class UntoldError(Exception):
    """A row is of several examples, or a rule cannot be told where its examples lie: the graph has to be measured."""


class Told(Protocol):
    """Tells whose rows are whose while the pass runs that norms are taken from (:mod:`engm.graph.routed`)."""

    def of_call(self, call: Call, backprops: Any) -> Ownership:
        """Where the examples lie in a call, from the gradient of its output.

        Raises:
            UntoldError: see there.
        """

    def at(self, entry: PlannedEntry, gradients: Sequence[Tensor | None]) -> PlannedEntry:
        """An entry as it is in this graph, from the gradients of the node's outputs.

        Raises:
            UntoldError: see there.
        """


@dataclass(frozen=True, eq=False)
class Plan:
    """Where the examples and the parameters are, for every graph of one structure; positions are in ``Trace.order``.

    Attributes:
        layouts: for every call of the trace; None for one that accounts for no parameter.
        entries: where shared tensors enter outside of calls.
        sinks: ``(position, output number)`` such that a backward pass to them runs through everything of interest and
            computes no parameter gradient on the way.
        couplings: positions of batch norms outside of captured calls that take their statistics from the batch.
        through: positions of the nodes of captured batch norms whose statistics are differentiated all the same.
        couples: whether statistics of a batch norm are taken for constants.
        of_all_ranks: whether some batch norm takes its statistics from the batches of several processes.
        coupled: whether other examples influence a loss otherwise than by such statistics.
        cancels: whether shares of other examples cancel in some rows, but for rounding.
        routes: what must have the same values for the plan to hold.
        keeps: whether the plan may hold for another graph at all.
        alone: whether what other graphs have shown is not to be added to it.
        blind: whether some gradient was not finite when the plan was made.
        lost: whether the plan does not tell of which examples such gradients are.
        silent: positions of nodes that no gradient came to, so that what is behind them is not known.
        behind_entries: whether some of them lie behind what enters, so that a pass runs through that too.
        quiet: positions of all nodes that no gradient came to.
        seen: where the examples lie in the outputs of all others, by position and number; None where several examples
            have a share. It is kept as long as some node is quiet.
        unknown_of_calls: by call (number) the rows ``[*leading]`` that no gradient came to where nothing else tells
            whose they are.
        unknown_of_nodes: the same by entering node (position).
        junctions: by position and number of the output.
        settled: positions of the nodes that put rows elsewhere of which no junction could be.
        silent_calls: numbers of the calls inside of compiled regions that no gradient came to.
        opaque: functions of the user's, which have to treat the examples apart for the plan to hold.
        told: tells the layouts when gradients arrive; those that are there are of another graph.
    """

    layouts: tuple[Ownership | None, ...]
    entries: tuple[PlannedEntry, ...] = ()
    sinks: tuple[tuple[int, int], ...] = ()
    couplings: tuple[int, ...] = ()
    through: tuple[int, ...] = ()
    couples: bool = False
    of_all_ranks: bool = False
    coupled: bool = False
    cancels: bool = False
    routes: tuple[Route, ...] = ()
    keeps: bool = True
    alone: bool = False
    blind: bool = False
    lost: bool = False
    silent: tuple[int, ...] = ()
    behind_entries: bool = False
    quiet: frozenset[int] = frozenset()
    seen: Mapping[tuple[int, int], Ownership | None] = field(default_factory=dict)
    unknown_of_calls: Mapping[int, Tensor] = field(default_factory=dict)
    unknown_of_nodes: Mapping[int, Tensor] = field(default_factory=dict)
    junctions: Mapping[tuple[int, int], Junction] = field(default_factory=dict)
    settled: frozenset[int] = frozenset()
    silent_calls: frozenset[int] = frozenset()
    opaque: tuple[OpaqueFunction, ...] = ()
    told: Told | None = None

    def tensors(self) -> Iterator[Tensor]:
        """All tensors in the plan that its steps read."""
        yield from self.unknown_of_calls.values()
        yield from self.unknown_of_nodes.values()
        yield from (junction.unknown for junction in self.junctions.values())
        of_entries = (layout for entry in self.entries for layout in (entry.layout, *entry.others))
        for ownership in (*self.layouts, *of_entries):
            if isinstance(ownership, Owners):
                yield from ownership.tensors()

    @property
    def doubtful(self) -> bool:
        """Whether a gradient where none was before, or a function that mixes examples, would make the plan void."""
        unknown = self.unknown_of_calls or self.unknown_of_nodes or self.junctions
        return bool(unknown or self.silent or self.silent_calls or self.opaque)


def sinks_of(
    traced: Trace, layouts: Sequence[Ownership | None], positions: Collection[int]
) -> tuple[tuple[int, int], ...]:
    """Edges such that a pass to them runs through all calls with a layout and the nodes at ``positions``."""
    wanted: dict[int, set[int]] = {}
    for number, layout in enumerate(layouts):
        if layout is not None:
            position = traced.positions[traced.nodes[number]]
            wanted.setdefault(position, set()).add(traced.calls[number].output_nr)
    for position in positions:
        wanted.setdefault(position, set()).update(range(len(node_outputs(traced.order[position]))))
    return tuple((position, number) for position in traced.deepest(wanted) for number in sorted(wanted[position]))


def _make_room(kept: dict[Hashable, Any], key: Hashable) -> None:
    """Let go of the oldest of what is kept, if there are too many for another key."""
    if key not in kept and len(kept) >= MOST_PLANS:
        del kept[next(iter(kept))]


class PlanCache(dict[Hashable, list[Plan]]):
    """The plans of the structures that were met, by signature; the oldest goes when there are too many."""

    def find(self, signature: Hashable, traced: Trace) -> Plan | None:
        """The plan that holds for a graph, if there is one; whose hooks are unknown holds nothing from before."""
        if traced.hooked:
            return None
        with recomputed_once():
            for plan in self.get(signature, ()):
                if all(route.holds(traced) for route in plan.routes):
                    return plan
        return None

    def keep(self, signature: Hashable, plan: Plan, instead: Plan | None = None) -> None:
        """Remember a plan, ``instead`` of an older one that turned out not to hold."""
        _make_room(self, signature)
        plan = plan if plan.quiet else replace(plan, seen={})
        others = [other for other in self.get(signature, ()) if other is not instead]
        self[signature] = [plan, *others[: MOST_ROUTINGS - 1]]

    def forget(self, signature: Hashable, plan: Plan) -> None:
        """Forget a plan that turned out not to hold."""
        self[signature] = [other for other in self.get(signature, ()) if other is not plan]


@dataclass(frozen=True)
class Collected:
    """What a pass that the gradients were compared by has found, so that the step need not run it again.

    Attributes:
        squared: squared norms ``[L, n]`` of the scaled losses.
        terms: by parameter (``id``), its terms, and the graph is used up; None if they were let go.
    """

    squared: Tensor
    terms: dict[int, Term] | None


@dataclass
class PlannedGraph:
    """A graph behind losses, and the plan that holds for it.

    Attributes:
        trace: the graph.
        plan: where the examples lie in it.
        n: number of examples, one loss each.
        plans: the wrapper's, where what is measured is remembered.
        measured: makes a plan from this very graph.
        fresh: whether the plan was made from this very graph, and serves no other: a recorded step runs again on other
            values.
        step: how many graphs the wrapper has met.
        surprises: while a step is recorded, whether the plan turned out not to hold, 0-dimensional.
        collected: by the pass that gradients were compared by, if they were, with constant statistics.
        couples_elsewhere: whether batch norm may couple the examples of other processes that take part in every pass,
            as under ``fully_shard``, so that as many passes have to be run as if it coupled these.
    """

    trace: Trace
    plan: Plan
    n: int
    plans: PlanCache
    measured: Callable[[], Plan]
    fresh: bool
    step: int = 0
    surprises: list[Tensor] = field(default_factory=list)
    collected: Collected | None = None
    couples_elsewhere: bool = False

    @property
    def couples(self) -> bool:
        """Whether some batch norm on the way takes its statistics from the batch, and they are held constant."""
        return self.plan.couples or self.couples_elsewhere

    @property
    def doubtful(self) -> bool:
        """Whether the plan has to be watched: it serves other graphs too, and may not hold for gradients like these."""
        return not self.fresh and self.plan.doubtful

    def renew(self) -> None:
        """Take a plan that is made from this very graph."""
        self.plan, self.fresh = self.measured(), True

    @property
    def terms_stand_alone(self) -> bool:
        """Whether terms, once they are formed, need the graph no more: what enters is the parameters themselves."""
        return all(
            self.trace.enters_as_leaf(entry.position, entry.slot, entry.turns) and not entry.waits(self.trace)
            for entry in self.plan.entries
        )

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors that norms are taken over."""
        return [parameter for _, parameter in self.trace.trained]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of :attr:`parameters`."""
        return tuple(name for name, _ in self.trace.trained)

    def sinks(self) -> list[GradientEdge]:
        """What a backward pass has to go to, so that it runs through everything of interest and no further."""
        return [self.trace.edge(position, number) for position, number in self.plan.sinks]

    def entry(self, planned: PlannedEntry) -> Entry:
        """An entry of the plan, in this graph."""
        return planned.at(self.trace, self.n)

    def frozen_statistics(self, gains: dict[int, Tensor] | None = None) -> AbstractContextManager[None]:
        """While the context is open, backward passes take the statistics of batch norms for constants.

        Args:
            gains: see :meth:`Trace.frozen_statistics`.
        """
        return self.trace.frozen_statistics(self.plan.couplings, self.plan.through, gains)

    def collecting(self, collector: Collector) -> AbstractContextManager[None]:
        """While the context is open, backward passes hand the gradients of all calls to ``collector``."""
        return self.trace.collecting(collector)


@dataclass
class _History:
    """What came of the graphs of one skeleton.

    Attributes:
        plan: the latest.
        unpaid: how many plans were made for which no :data:`STEADY` graphs were met that a plan held for.
        unkept: how many plans in a row may hold for no other graph.
        told: how many graphs' rows were to be told.
        untold: how many of them had to be measured after all.
        met: how many graphs in a row the plan that is kept was taken for.
        brief: how many plans in a row held for a few graphs alone, and then turned out not to.
    """

    plan: Plan
    unpaid: float = 0
    unkept: int = 0
    told: int = 0
    untold: int = 0
    met: int = 0
    brief: int = 0


class Skeletons:
    """The latest plan of every skeleton of a graph, and whether graphs of it have to be measured again and again.

    They have where the plans that are kept hold for few graphs, and where several plans in a row were such that they
    are not kept.
    """

    def __init__(self) -> None:
        self._histories: dict[Hashable, _History] = {}
        self._unpaid = 0.0  # plans of all skeletons, as in their histories
        self._without: dict[Hashable, int] = {}  # by signature, graphs without a plan; more than STEADY: one was made

    def held(self, skeleton: Hashable) -> None:
        """A plan that is kept held for a graph of this skeleton."""
        self._unpaid = max(0, self._unpaid - 1 / STEADY)
        if skeleton in self._histories:
            history = self._histories[skeleton]
            history.unpaid = max(0, history.unpaid - 1 / STEADY)
            history.met += 1

    def surprised(self, skeleton: Hashable) -> None:
        """A plan that was taken for a graph of this skeleton turned out not to hold."""
        history = self._histories.get(skeleton)
        if history is not None:
            history.brief = 0 if history.met > STEADY else history.brief + 1
            history.met = 0

    def brief(self, skeleton: Hashable, most: int) -> bool:
        """Whether at least ``most`` plans in a row held for a few graphs alone."""
        history = self._histories.get(skeleton)
        return history is not None and history.brief >= most

    def come_again(self, skeleton: Hashable) -> bool:
        """Whether graphs of this skeleton are likely to be met again: it is not one of many that were met once."""
        return self._unpaid < CHANGING or skeleton in self._histories

    def often(self, signature: Hashable) -> bool:
        """Whether graphs with this signature are met often enough that it pays off to try and make a plan for them."""
        return self._without.get(signature) == STEADY

    def measured(self, skeleton: Hashable, signature: Hashable, plan: Plan) -> None:
        """A graph of this skeleton and signature was measured."""
        self._unpaid += 1
        self._note_without(signature, STEADY + 1)
        _make_room(self._histories, skeleton)
        history = self._histories.setdefault(skeleton, _History(plan))
        history.plan = plan
        history.unpaid += 1
        history.unkept = 0 if plan.keeps else history.unkept + 1

    def told(self, skeleton: Hashable, signature: Hashable) -> None:
        """The rows of a graph of this skeleton and signature are to be told by the plan of another."""
        self._note_without(signature, self._without.get(signature, 0) + 1)
        self._histories[skeleton].told += 1

    def _note_without(self, signature: Hashable, graphs: int) -> None:
        _make_room(self._without, signature)
        self._without[signature] = graphs

    def untold(self, skeleton: Hashable) -> None:
        """They could not be."""
        self._histories[skeleton].untold += 1

    def may_tell(self, skeleton: Hashable) -> bool:
        """Whether it is worth another try: mostly they could be told."""
        history = self._histories[skeleton]
        return history.untold < RESTLESS or 2 * history.untold < history.told

    def restless(self, skeleton: Hashable) -> Plan | None:
        """The latest plan, where plans hold for a few graphs at most: nothing is gained by keeping the next one.

        Graphs for which a plan that is kept does hold may lie in between.
        """
        history = self._histories.get(skeleton)
        return history.plan if history and max(history.unpaid, history.unkept) >= RESTLESS else None


class Watch:
    """When the gradients are compared with autograd's: the first time that a structure is met, and every so often.

    Where almost every step has a structure of its own (layers that are skipped at random) only some of the new ones are
    checked, after the first few.

    Attributes:
        steps: graphs so far.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._checked: dict[Hashable, int] = {}
        self._latest = 0

    def would_be_due(self, signature: Hashable, every: int, after: int = 1) -> bool:
        """What :meth:`due` would say of the next graph but ``after - 1``."""
        steps, last = self.steps + after, self._checked.get(signature)
        few = len(self._checked) < NEW_CHECKS or steps - self._latest >= APART
        return few if last is None else steps - last >= every

    def due(self, signature: Hashable, every: int) -> bool:
        """Whether this graph is to be checked; every graph is asked about once."""
        due = self.would_be_due(signature, every)
        self.steps += 1
        return due

    def passed(self, signature: Hashable) -> None:
        """The graph that was asked about last was checked, and is right; one that is wrong stays due."""
        _make_room(self._checked, signature)
        self._checked[signature] = self._latest = self.steps
