"""What the plans of two graphs know together, if the graphs are of one structure and route their rows alike.

Gradients that vanish keep a plan from knowing whose the rows are behind them, and where they vanish may change from
step to step: the tokens that a loss masks, a softmax over one key. What was seen once holds for later steps, so each
measurement adds to what is known until nothing is in doubt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..terms.layout import Layout
from ..terms.owners import NOBODY, Owners, Ownership
from .arrangement import without_witnesses
from .plan import Junction, Plan, PlannedEntry, Source, sinks_of
from .trace import Trace

Known = tuple[Ownership | None, Tensor | None]
"""Where the examples lie in a tensor, and of which rows that is not known."""


class _ContradictionError(Exception):
    """The plans do not agree on something that both of them have seen."""


def combined(old: Plan, new: Plan, traced: Trace) -> Plan:
    """The plan that knows what either plan does, or ``new`` where they contradict each other or one stands alone.

    Args:
        old: a plan that was kept.
        new: made from a graph with the structure and the routes of ``old``.
        traced: this graph.
    """
    if old.alone or new.alone:
        return new
    try:
        return _combined(old, new, traced)
    except _ContradictionError:
        return new


def _combined(old: Plan, new: Plan, traced: Trace) -> Plan:
    quiet = old.quiet & new.quiet
    _check_edges(old, new, traced)
    layouts, unknown_of_calls = [], {}
    for number, node in enumerate(traced.nodes):
        position = traced.positions[node]
        layout, unknown = _of_both(
            (old.layouts[number], old.unknown_of_calls.get(number)),
            (new.layouts[number], new.unknown_of_calls.get(number)),
            position in old.quiet,
            position in new.quiet,
        )
        layouts.append(layout)
        if unknown is not None:
            unknown_of_calls[number] = unknown
    entries, unknown_of_nodes = _entries_of_both(old, new)
    silent = tuple(sorted({*old.silent, *new.silent} & quiet))
    if set(old.through) - new.quiet != set(new.through) - old.quiet:
        raise _ContradictionError
    return replace(
        new,
        layouts=tuple(layouts),
        entries=entries,
        sinks=sinks_of(traced, layouts, {entry.position for entry in entries} | set(silent)),
        couplings=tuple(sorted({*old.couplings, *new.couplings})),
        through=tuple(sorted({*old.through, *new.through})),
        couples=old.couples or new.couples,
        coupled=old.coupled or new.coupled,
        routes=tuple(
            {(route.position, route.name, route.number): route for route in (*old.routes, *new.routes)}.values()
        ),
        silent=silent,
        behind_entries=old.behind_entries or new.behind_entries,
        quiet=quiet,
        seen={**old.seen, **new.seen},
        unknown_of_calls=unknown_of_calls,
        unknown_of_nodes=unknown_of_nodes,
        junctions=_junctions_of_both(old, new, traced),
        settled=frozenset(
            position
            for one, other in ((old, new), (new, old))
            for position in one.settled
            if position in other.settled or not _sees_less(one, other, position, traced)
        ),
    )


def _entries_of_both(old: Plan, new: Plan) -> tuple[tuple[PlannedEntry, ...], dict[int, Tensor]]:
    before, now = ({(e.position, e.slot): e for e in plan.entries} for plan in (old, new))
    entries, unknown_of_nodes = [], {}
    for key in sorted({*before, *now}):
        position = key[0]
        if key not in before or key not in now:
            _refuse_news(key in before, key in now, position in old.quiet, position in new.quiet)
            entry = before[key] if key in before else now[key]
            plan = old if key in before else new
            unknown = plan.unknown_of_nodes.get(position)
        else:
            first, second = before[key], now[key]
            layout, unknown = _agreed(
                (first.layout, old.unknown_of_nodes.get(position)), (second.layout, new.unknown_of_nodes.get(position))
            )
            if len(first.others) != len(second.others):
                raise _ContradictionError
            others = [
                a if b is None else b if a is None else _agreed((a, None), (b, None))[0]
                for a, b in zip(first.others, second.others, strict=True)
            ]
            assert layout is not None
            sources = _sources_of_both(first.sources, second.sources)
            entry = replace(second, layout=layout, others=tuple(others), sources=sources)
        entries.append(entry)
        if unknown is not None:
            unknown_of_nodes[position] = unknown
    return tuple(entries), unknown_of_nodes


def _sources_of_both(before: Sequence[Source], now: Sequence[Source]) -> tuple[Source, ...]:
    """The parameters that a tensor is computed from; a layer without a gradient may have hidden some of them.

    A tensor that several branches lead to consists of elements of none of them.
    """
    found = dict.fromkeys(source.parameter for source in (*before, *now))
    alike = len(found) == len(before) == len(now) and all(source.rearranged for source in (*before, *now))
    return tuple([Source(parameter, alike) for parameter in found])


def _check_edges(old: Plan, new: Plan, traced: Trace) -> None:
    """Refuse to put together what two plans know where gradients come to a node that one of them alone has seen.

    It is known by the gradient that came by an edge at one step. At the other step the edge has to begin where the
    same examples lie, or what comes by it next is of others.
    """
    once, other = old.quiet - new.quiet, new.quiet - old.quiet
    for position, children in enumerate(traced.children):
        ends = {child for child in children if child is not None}
        if once.isdisjoint(ends) and other.isdisjoint(ends):
            continue
        unseen = other if position in once else once if position in other else frozenset()
        if not unseen.isdisjoint(ends):  # neither plan has seen the edge
            raise _ContradictionError
        for key in [key for key in old.seen if key[0] == position and key in new.seen]:
            before, now = old.seen[key], new.seen[key]
            if before is not None and now is not None:
                _agreed((before, None), (now, None))
            elif before is not now:
                raise _ContradictionError


def _sees_less(one: Plan, other: Plan, position: int, traced: Trace) -> bool:
    """Whether one plan had no gradient behind a node where the other one had: it does not know how rows go there."""
    return any(child in one.quiet and child not in other.quiet for child in traced.children[position])


def _junctions_of_both(old: Plan, new: Plan, traced: Trace) -> dict[tuple[int, int], Junction]:
    """The junctions of which neither plan has seen all rows.

    Rows that come up more than once are the same example's as long as one plan has seen them, or a layout tells. What
    is moved is watched as long as one plan alone knows of what it is moved to.
    """
    found = {}
    for key in {*old.junctions, *new.junctions}:
        before, now = old.junctions.get(key), new.junctions.get(key)
        if before is None or now is None:
            there, other = (new, old) if before is None else (old, new)
            junction = there.junctions[key]
            # Else the other one has seen all rows, or knows where they lie and are moved to.
            knows = key[0] in other.settled and not _sees_less(other, there, key[0], traced)
            if key[0] in other.quiet or (junction.moved and not knows):
                found[key] = junction
            continue
        if before.moved or now.moved:
            missed = _both(before.unknown, now.unknown)
            missed = missed | before.unknown if _sees_less(new, old, key[0], traced) else missed
            missed = missed | now.unknown if _sees_less(old, new, key[0], traced) else missed
            if bool(missed.any()):
                found[key] = replace(now, unknown=missed, moved=True)
            continue
        layout, unknown = _agreed((before.layout, before.unknown), (now.layout, now.unknown))
        if now.by_index or not isinstance(layout, Layout):
            found[key] = now if bool((before.unknown & ~now.unknown).any()) else before
        elif unknown is not None:
            found[key] = replace(now, unknown=unknown)
    return found


def _of_both(before: Known, now: Known, was_quiet: bool, is_quiet: bool) -> Known:
    if before[0] is not None and now[0] is not None:
        return _agreed(before, now)
    _refuse_news(before[0] is not None, now[0] is not None, was_quiet, is_quiet)
    return before if now[0] is None else now


def _refuse_news(was_there: bool, is_there: bool, was_quiet: bool, is_quiet: bool) -> None:
    """What one plan alone knows of must be where the other one had no gradient."""
    if (was_there and not is_quiet) or (is_there and not was_quiet):
        raise _ContradictionError


def _both(missed: Tensor, misses: Tensor) -> Tensor:
    """Of which rows neither plan knows whose they are. One plan may tell apart elements where the other tells rows."""
    if missed.shape != misses.shape:
        raise _ContradictionError
    return missed & misses


def _agreed(before: Known, now: Known) -> Known:
    """What both have seen, and of which rows neither knows whose they are."""
    (first, missed), (second, misses) = before, now
    unknown = None if missed is None or misses is None else _both(missed, misses)
    if isinstance(first, Layout) and unknown is not None:
        unknown = without_witnesses(unknown, first)
    if unknown is not None and not bool(unknown.any()):
        unknown = None
    if isinstance(first, Layout) or isinstance(second, Layout):
        if first != second:
            raise _ContradictionError
        return second, unknown
    assert first is not None
    assert second is not None
    if first.of.shape != second.of.shape:
        raise _ContradictionError
    both = (first.of != NOBODY) & (second.of != NOBODY)
    if bool((both & (first.of != second.of)).any()):
        raise _ContradictionError
    return Owners(torch.where(second.of == NOBODY, first.of, second.of), second.n), unknown
