"""The plan of a graph: where the examples lie in every captured call, and where parameters enter outside of calls.

Made once for every structure of a graph (:mod:`engm.strict`), from what its nodes hold (:mod:`engm.structure`).
"""

from __future__ import annotations

from dataclasses import dataclass

from .graph import Trace
from .layout import Layout
from .rules.operators import Entry


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
    """See the module's docstring.

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
