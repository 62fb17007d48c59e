"""The plan of a graph: where the examples lie in every captured call, and where parameters enter outside of calls.

A plan is made once for every structure of a graph (:mod:`engm.graph.planning`), from what the graph's nodes hold
(:mod:`engm.graph.node_kinds`), and kept in a :class:`PlanCache`.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..capture.calls import Collector
from ..rules.entries import Entry
from ..terms.layout import Layout
from .trace import Trace

MOST_PLANS = 256  # kept at once; layers that are skipped at random make a new structure at almost every step


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
        layout: of the node's output.
        transposed: the entering tensor is the input of a transposition in between.
        sources: the parameters behind it.
        ruled: whether its operator has a rule; if not, the operator's own backward runs once an example.
    """

    position: int
    slot: int
    shape: tuple[int, ...]
    layout: Layout
    transposed: bool
    sources: tuple[Source, ...]
    ruled: bool = True

    def at(self, traced: Trace, n: int) -> Entry:
        """The entry in a graph of the same structure."""
        return Entry(traced.order[self.position], self.slot, self.shape, self.layout, n, self.transposed)


@dataclass(frozen=True)
class Plan:
    """Where the examples and the parameters are, for every graph of one structure; positions are in ``Trace.order``.

    Attributes:
        layouts: for every call of the trace; None for one that sees no batch.
        entries: where shared tensors enter outside of calls.
        sinks: ``(position, output number)`` such that a backward pass to them runs through everything of interest and
            computes no parameter gradient on the way.
        couplings: positions of batch norms outside of captured calls that take their statistics from the batch.
        of_all_ranks: whether some batch norm takes its statistics from the batches of several processes.
    """

    layouts: tuple[Layout | None, ...]
    entries: tuple[PlannedEntry, ...] = ()
    sinks: tuple[tuple[int, int], ...] = ()
    couplings: tuple[int, ...] = ()
    of_all_ranks: bool = False


@dataclass(frozen=True)
class PlannedGraph:
    """A graph behind losses, and the plan that holds for it.

    Attributes:
        trace: the graph.
        plan: where the examples lie in it.
        n: number of examples, one loss each.
    """

    trace: Trace
    plan: Plan
    n: int

    @property
    def couples(self) -> bool:
        """Whether some batch norm on the way takes its statistics from the batch."""
        return self.trace.couples or bool(self.plan.couplings)

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

    def frozen_statistics(self) -> AbstractContextManager[None]:
        """While the context is open, backward passes take the statistics of all batch norms for constants."""
        return self.trace.frozen_statistics(self.plan.couplings)

    def collecting(self, collector: Collector) -> AbstractContextManager[None]:
        """While the context is open, backward passes hand the gradients of all calls to ``collector``."""
        return self.trace.collecting(collector)


class PlanCache(dict[Hashable, Plan]):
    """The plans of the structures that were met, by signature; the oldest goes when there are too many."""

    def keep(self, signature: Hashable, plan: Plan) -> None:
        """Remember a plan."""
        if len(self) >= MOST_PLANS:
            del self[next(iter(self))]
        self[signature] = plan
