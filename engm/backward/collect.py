"""One backward pass that collects terms: no parameter gradient is computed, every use of a parameter is visited.

The pass goes to the *sinks* of the graph (:mod:`engm.graph.plan`), so autograd skips all weight gradients. The terms of
a call, or of a tensor that enters outside of calls, are formed when its backprops arrive, turned into squared norms as
soon as all uses of the parameter are in, and let go unless one-pass accumulation wants them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ..batch_norm.correction import BatchNormCall, correct_terms
from ..capture.calls import Call
from ..checks import RefusedError
from ..distributed import on_any
from ..graph.opaque import watched
from ..graph.owners import unnoticed
from ..graph.plan import PlannedEntry, PlannedGraph, UntoldError
from ..repeatable import repeatable_kernels
from ..rules import WholeCallRule
from ..rules.any_operator import term_of_any
from ..rules.conv import ConvRule
from ..rules.entries import entry_term
from ..rules.linear import LinearRule, RowCall, are_small_rows
from ..rules.normalization import BatchNormRule
from ..rules.pulled_back import JoinedUses, Origin, derived_term
from ..terms import Term, accumulation_dtype, weighted_sums
from ..terms.layout import Layout
from ..terms.owners import Owners, Ownership
from ..torch_internals import gradients_of, is_recorded, recomputed_once, rows_of_nested, version_of

# Bytes of factors that are scaled by one call, which for every layer would cost more than its work: on CUDA 64 MB take
# 40 µs; the CPU needs little more memory than the largest of them.
SCALED_AT_ONCE = {"cuda": 64 << 20, "cpu": 1 << 20}

LARGEST_POWER = 128.0  # of two that losses are multiplied by, so that their shares do not cancel

_NOTHING = nullcontext()


@dataclass
class Joining:
    """Calls of one module that become one.

    Attributes:
        to_come: how many there are.
        arrived: those whose gradients are in: the call, where its examples lie, the gradients of its outputs.
    """

    to_come: int = 0
    arrived: list[tuple[Call, Ownership, tuple[Tensor | None, ...]]] = field(default_factory=list)


class TermCollector:
    """Collects squared norms, terms, or both, from one backward pass.

    Args:
        graph: the planned graph behind the losses.
        norms: compute squared norms.
        keep: keep the terms for :meth:`weighted_sums`.
        correct: apply the local batch-norm correction where a layer feeds a batch norm directly.

    Attributes:
        rows: the row of every parameter (by ``id``) in the squared norms.
        terms: by parameter (``id``), the terms that were kept.
    """

    def __init__(self, graph: PlannedGraph, *, norms: bool = True, keep: bool = False, correct: bool = False) -> None:
        self.graph = graph
        self.n = graph.n
        self.norms = norms
        self.keep = keep
        self.parameters = graph.parameters
        self.rows = {id(parameter): row for row, parameter in enumerate(self.parameters)}
        self.correct = correct
        self._consume = False  # the graph is freed as the pass goes; let go of activations with it
        self._start()

    def _start(self) -> None:
        """Nothing is collected yet, and the plan says what is to come."""
        self.squared: list[Tensor | None] = [None] * len(self.parameters)
        self.terms: dict[int, Term] = {}
        self._drawn: Tensor | None = None  # powers of two [n] that the collected gradients are multiplied by
        self._pulling = False  # gradients of what enters are pulled back to parameters, within the pass
        self._surprise: Tensor | None = None  # whether the plan turned out not to hold
        self._joining: dict[tuple[int, Any], Joining] = {}  # by module (id) and what was saved, calls taken together
        self._pending: dict[int, list[tuple[Origin | None, Term]]] = {}
        self._joined_uses = JoinedUses(hooked=self.graph.trace.hooked)
        self._expected: dict[int, int] = {}
        self._alike: dict[int, list[Tensor]] = {}  # by parameter (id), those that enter by the same entries
        self._waiting: set[int] = set()  # entries (id) whose terms are formed when the pass is over
        self._deferred: list[tuple[PlannedEntry, list[Tensor | None]]] = []
        self._layouts: dict[int, Ownership] = {}  # id(call) -> of its output; none for one that accounts for nothing
        self._unknown: dict[int, Tensor] = {}  # id(call) -> rows that had no gradient when the plan was made
        self._on_rows: set[int] = set()  # calls (id) on a row an example, whose terms are formed when all are in
        self._set_aside: list[tuple[RowCall, int]] = []  # those that are in, and how often backprops were written into
        self._silent: set[int] = set()  # calls (id) inside of compiled regions that had none
        self._batch_norm_of: dict[int, Call] = {}  # id(producer) -> its batch norm
        self._batch_norm_sums: dict[int, tuple[Tensor, Tensor]] = {}  # id(batch norm call) -> shift, scale gradients
        self._expect_uses()
        self._gains: dict[int, Tensor] = {}  # id(batch norm call) -> its scale / sigma [C]
        self._feeding = {id(batch_norm) for batch_norm in self._batch_norm_of.values()}

    def _expect_uses(self) -> None:
        """Count how many terms each parameter will get, and note which layers feed a batch norm."""
        trace, plan = self.graph.trace, self.graph.plan
        own = None if trace.own is trace.calls else set(map(id, trace.own))
        doubtful, expected = self.graph.doubtful, self._expected
        by_rows = not (doubtful or self.correct) and plan.told is None
        for number, (call, layout) in enumerate(zip(trace.calls, plan.layouts, strict=True)):
            key = id(call)
            if layout is None or (own is not None and key not in own):
                if doubtful and number in plan.silent_calls:
                    self._silent.add(key)
                continue
            self._layouts[key] = layout
            if doubtful and number in plan.unknown_of_calls:
                self._unknown[key] = plan.unknown_of_calls[number]
            uses = 1
            if call.rule.joins:
                joining = self._joining.setdefault((id(call.module), call.saved), Joining())
                joining.to_come += 1
                uses = 1 if joining.to_come == 1 else 0
            for parameter in call.parameters.values():
                expected[id(parameter)] = expected.get(id(parameter), 0) + uses
            held = trace.places[number] not in plan.through  # whose statistics are held constant
            if self.correct and held and layout.plain and correctable(call):
                self._batch_norm_of[id(call.producer)] = call
            if by_rows and layout.plain and call.parameters and are_small_rows(call.shape) and call.rule.of_rows:
                self._on_rows.add(key)
        entered: dict[int, list[int]] = {}
        for number, entry in enumerate(plan.entries):
            for source in entry.sources:
                expected[source.parameter] = expected.get(source.parameter, 0) + 1
                entered.setdefault(source.parameter, []).append(number)
        by_entries: dict[tuple[int, ...], list[Tensor]] = {}
        for key, numbers in entered.items():
            if key in self.rows:
                self._alike[key] = by_entries.setdefault(tuple(numbers), [])
                self._alike[key].append(self.parameters[self.rows[key]])

    # -- running ---------------------------------------------------------------------------------------------

    def run(
        self,
        losses: Tensor,
        seeds: Tensor,
        inputs: Sequence[Tensor] = (),
        *,
        retain_graph: bool,
        frozen: bool = True,
        as_they_are: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Backpropagate ``sum_i seeds_i losses_i`` to the sinks and ``inputs``; returns the inputs' gradients.

        Args:
            losses: ``[n]``.
            seeds: ``[n]``.
            inputs: tensors whose gradients are wanted.
            retain_graph: keep the graph.
            frozen: take the statistics of batch norms for constants. Without that, an example's terms are what hooks
                see in an ordinary backward pass, where batch norms couple the examples: not the gradient of anything.
            as_they_are: terms are to be those of the seeds, for others than this collector.
        """
        graph = self.graph
        parted = not (inputs or as_they_are) and self._may_cancel(frozen)
        self._drawn = powers_of_two(losses) if parted else None
        drawn = seeds if self._drawn is None else seeds * self._drawn
        gradients = self._passed(losses, drawn, inputs, retain_graph, frozen)
        surprised = False
        if self._surprise is not None and is_recorded():
            graph.surprises.append(self._surprise)
        elif self._surprise is not None:
            surprised = bool(self._surprise)
        if on_any(graph.trace.group, surprised, losses.device):
            graph.renew()
            self._start()
            gradients = self._passed(losses, seeds, inputs, retain_graph, frozen)
        with recomputed_once():
            self._take_deferred()
            for joining in self._joining.values():  # modules of which some call got no gradient
                if joining.arrived:
                    self._join(joining)
            for key in list(self._pending):  # parameters of which some use got no gradient
                self._finish(key)
        return gradients

    def _may_cancel(self, frozen: bool) -> bool:
        """Whether shares of several examples might cancel where a gradient would be a surprise.

        They do in the gradient of a sum of losses. Powers of two, another for each of these, part them, and are divided
        out again exactly. Functions and hooks of the user's may change gradients by how large they are, coupled
        examples have no gradients apart, and where owners are told it is by the gradients as they are, and by scaled
        ones.
        """
        plan, traced = self.graph.plan, self.graph.trace
        if not self.graph.doubtful or self.n == 1 or plan.coupled or plan.opaque or traced.hooked:
            return False
        if plan.couples and not frozen:
            return False
        return plan.told is None and torch.float16 not in traced.dtypes

    def _take_deferred(self) -> None:
        """Take the terms that could not be formed while the pass ran."""
        for entry, arrived in self._deferred:
            planned = self.graph.entry(entry)
            self._take(entry, entry_term(planned, arrived) or term_of_any(planned, arrived))
        self._deferred.clear()

    def _passed(
        self, losses: Tensor, seeds: Tensor, inputs: Sequence[Tensor], retain_graph: bool, frozen: bool
    ) -> tuple[Tensor | None, ...]:
        """One backward pass, in which terms are collected; returns the inputs' gradients."""
        graph = self.graph
        sinks = graph.sinks()
        targets: list[Any] = [*sinks, *inputs]
        unsure = graph.doubtful or graph.plan.told is not None
        self._consume = not (retain_graph or unsure)
        self._waiting = {id(entry) for entry in graph.plan.entries if entry.waits(graph.trace)}
        captured, passed = self._entries_by_node()
        # A pass to the inputs runs through nodes of which entries are read when it is over.
        read_later = bool(self._waiting) or bool(captured and inputs) or graph.plan.behind_entries
        keep_graph = retain_graph or unsure or read_later
        statistics = graph.frozen_statistics(self._gains) if frozen and graph.couples else _NOTHING
        opaque = graph.plan.opaque if graph.doubtful else ()
        functions = watched(opaque, graph.trace, self.n, graph.step, self._suspect) if opaque else _NOTHING
        entering = self._watching(passed) if passed else _NOTHING
        # Where the owners of rows are told by a comparison with this very pass, it has to repeat.
        kernels = _NOTHING if graph.plan.told is None else repeatable_kernels(losses.device)
        with statistics, entering, functions, graph.collecting(self), kernels:
            gradients = gradients_of(losses, targets, seeds, keep_graph) if targets else ()
        if self._set_aside:
            self._form_rows()
        outputs: dict[int, list[Tensor | None]] = {}
        for (position, _), gradient in zip(graph.plan.sinks, gradients, strict=False):
            outputs.setdefault(position, []).append(gradient)
        for position, entries in captured.items():
            self._enter(position, entries, outputs[position])
        return tuple(gradients[len(sinks) :])

    def _entries_by_node(self) -> tuple[dict[int, list[PlannedEntry]], dict[int, list[PlannedEntry]]]:
        """Entries by position: at sinks, where autograd hands gradients out without running the node; and elsewhere."""
        sinks = {position for position, _ in self.graph.plan.sinks}
        captured: dict[int, list[PlannedEntry]] = {}
        passed: dict[int, list[PlannedEntry]] = {}
        for entry in self.graph.plan.entries:
            found = captured if entry.position in sinks else passed
            found.setdefault(entry.position, []).append(entry)
        plan = self.graph.plan
        for position in {*plan.silent, *(key[0] for key in plan.junctions)} if self.graph.doubtful else ():
            (captured if position in sinks else passed).setdefault(position, [])
        return captured, passed

    @contextmanager
    def _watching(self, passed: dict[int, list[PlannedEntry]]) -> Iterator[None]:
        """Hooks on the nodes of entries that the pass runs through."""
        handles = []
        try:
            for position, entries in passed.items():
                node = self.graph.trace.order[position]
                handles.append(node.register_prehook(partial(self._enter, position, entries)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- collecting ------------------------------------------------------------------------------------------

    def holds(self, call: Call) -> bool:
        """Whether the operands of a call are needed beyond :meth:`receive`."""
        if self.keep or id(call) in self._on_rows:
            return True
        return any(self._expected.get(id(p), 0) > 1 for p in call.parameters.values())

    def receive(self, call: Call, backprops: Any) -> None:
        """Take the gradient of one call's output, soon after it came; grad mode is off."""
        if id(call) in self._on_rows:
            read = call.activations() if call.reads else None
            self._set_aside.append(((call.parameters, read, backprops), version_of(backprops)))
            if self._consume:
                call.release()
            return
        layout = self._layouts.get(id(call))
        if layout is None:
            if id(call) in self._silent:
                self._doubt(backprops, torch.ones((), dtype=torch.bool, device=backprops.device))
            return
        told = self.graph.plan.told
        if told is not None:
            try:
                layout = told.of_call(call, backprops)
            except UntoldError:
                self._surprise = torch.ones((), dtype=torch.bool)
                return
        if call.rule.whole_call:
            self._receive_whole(call, layout, backprops)
            return
        if backprops.requires_grad:
            backprops = backprops.detach()
        if backprops.numel() == 0 or not (call.parameters or id(call) in self._feeding):
            return
        activations = call.activations() if call.reads else backprops  # a stand-in that nobody reads
        if isinstance(layout, Owners) and layout.dims == 0:  # one example, without a dimension of examples
            layout = Owners(layout.of.unsqueeze(0), layout.n)
            several = isinstance(activations, tuple)
            activations = tuple(t.unsqueeze(0) for t in activations) if several else activations.unsqueeze(0)
            backprops = backprops.unsqueeze(0)
        if id(call) in self._unknown:
            self._doubt(backprops, self._unknown[id(call)])
        self._form(call, layout, activations, backprops)

    def _form_rows(self) -> None:
        """Form the terms of the calls on a row an example."""
        calls = [call for call, _ in self._set_aside]
        if [version_of(call[2]) for call in calls] != [version for _, version in self._set_aside]:
            raise RefusedError(
                "engm: a gradient was modified in place by the backward function or hook that it was handed to, so "
                "norms would be wrong. Return a new tensor there."
            )
        self._set_aside.clear()
        expected, rows = self._expected, self.rows
        with torch.no_grad():
            for (parameters, _, _), terms in zip(calls, LinearRule.terms_of_rows(calls, self.norms), strict=True):
                for name, (term, norm) in terms.items():
                    key = id(parameters[name])
                    if expected[key] == 1 and key in rows:
                        self._hold(key, term, norm)
                    else:
                        self._add(key, None, term)

    def _form(self, call: Call, layout: Ownership, activations: Any, backprops: Tensor) -> None:
        """Form the terms of a call with every row as an example, and add up those of an example."""
        if backprops.is_nested:
            activations, backprops = (rows_of_nested(t) if t.is_nested else t for t in (activations, backprops))
        dims = layout.dims if isinstance(layout, Owners) else 1 + layout.dim
        if dims > 1:
            layout = layout.flattened(backprops.shape)
            activations, backprops = (t.flatten(0, dims - 1) for t in (activations, backprops))
        feeds = id(call) in self._feeding
        names = ("weight", "bias") if feeds else tuple(call.parameters)
        terms = call.rule.terms(call.as_called, activations, backprops, call.saved, names)
        if feeds:
            scale, shift = (terms[name].gradient for name in ("weight", "bias"))  # type: ignore[attr-defined]
            self._batch_norm_sums[id(call)] = (shift, scale)
        if id(call) in self._batch_norm_of and layout.plain:
            self._correct(terms, call, self._batch_norm_of[id(call)])
        self._add_rows(call, layout, terms)

    def _receive_whole(self, call: Call, layout: Ownership, backprops: Sequence[Tensor | None]) -> None:
        """A call whose rule arranges its examples by itself."""
        given = tuple(None if gradient is None else gradient.detach() for gradient in backprops)
        if id(call) in self._unknown:
            for rows in call.by_example(given):
                self._doubt(rows, self._unknown[id(call)])
        if call.rule.joins:
            joining = self._joining[id(call.module), call.saved]
            joining.arrived.append((call, layout, given))
            if len(joining.arrived) == joining.to_come:
                self._join(joining)
            return
        terms = call.rule.terms(call.module, call.activations(), given, call.saved, tuple(call.parameters))
        self._add_rows(call, layout, terms)

    def _join(self, joining: Joining) -> None:
        """Form the terms of all calls of a module that have arrived, as those of one call."""
        calls = [call for call, _, _ in joining.arrived]
        first = calls[0]
        rule = cast(WholeCallRule, first.rule)
        arguments, given = rule.joined(first.module, [(c.activations(), g) for c, _, g in joining.arrived])
        device = next(g for g in given if g is not None).device
        layout: Ownership = Layout(0, len(calls), 1)
        if not all(own.plain for _, own, _ in joining.arrived):
            owners = [o if isinstance(o, Owners) else Owners.regular(o, self.n, device) for _, o, _ in joining.arrived]
            layout = Owners(torch.cat([own.of.flatten() for own in owners]), self.n)
        joining.arrived.clear()
        terms = first.rule.terms(first.module, arguments, given, first.saved, tuple(first.parameters))
        self._add_rows(first, layout, terms)
        for call in calls[1:] if self._consume else ():
            call.release()

    def _add_rows(self, call: Call, layout: Ownership, terms: dict[str, Term]) -> None:
        """Add terms that have every row of a call for an example."""
        plain = layout.plain
        for key, parameter in call.parameters.items():
            self._add(id(parameter), None, terms[key] if plain else terms[key].grouped(layout))
        if self._consume:
            call.release()

    def _doubt(self, gradient: Tensor, unknown: Tensor) -> None:
        """Note whether a gradient came to rows of which the plan does not know whose they are."""
        if gradient.numel() == 0:
            return
        largest = gradient.detach().reshape(*unknown.shape, -1).abs().amax(-1)
        least = unnoticed(gradient.dtype) * (1.0 if self._drawn is None else LARGEST_POWER)
        self._suspect(((largest > least) & unknown).any())

    def _suspect(self, found: Tensor) -> None:
        """Note whether the plan turned out not to hold, 0-dimensional."""
        self._surprise = found if self._surprise is None else self._surprise | found

    def _enter(self, position: int, entries: list[PlannedEntry], gradients: Sequence[Tensor | None]) -> None:
        """Take the gradients of the outputs of a node by which shared tensors enter, or that had none so far."""
        if self._pulling or all(gradient is None for gradient in gradients):
            return  # what is pulled back to parameters may come by here too
        if self.graph.doubtful:
            plan = self.graph.plan
            if position in plan.silent:
                for gradient in gradients:
                    if gradient is not None:
                        self._doubt(gradient, torch.ones((), dtype=torch.bool, device=gradient.device))
            if position in plan.unknown_of_nodes and gradients[0] is not None:
                self._doubt(gradients[0], plan.unknown_of_nodes[position])
            for number, gradient in enumerate(gradients):
                if gradient is not None and (position, number) in plan.junctions:
                    self._doubt(gradient, plan.junctions[position, number].unknown)
        waiting = [id(entry) in self._waiting for entry in entries]
        told = self.graph.plan.told
        if told is not None:
            try:
                entries = [told.at(entry, gradients) for entry in entries]
            except UntoldError:
                self._surprise = torch.ones((), dtype=torch.bool)
                return
        self._pulling = True
        try:
            for entry, waits in zip(entries, waiting, strict=True):
                term = None if waits else entry_term(self.graph.entry(entry), gradients)
                if term is None:
                    self._deferred.append((entry, [None if g is None else g.detach() for g in gradients]))
                else:
                    self._take(entry, term)
        finally:
            self._pulling = False

    def _take(self, entry: PlannedEntry, term: Term) -> None:
        """Add the term of a shared tensor to those of the parameters that it was computed from."""
        if self.graph.trace.enters_as_leaf(entry.position, entry.slot, entry.turns):
            for source in entry.sources:
                self._add(source.parameter, None, term)
            return
        child, number = self.graph.entry(entry).child
        for source in entry.sources:
            self._add(source.parameter, Origin(child, number, source.rearranged), term)

    def _add(self, key: int, origin: Origin | None, term: Term) -> None:
        if key not in self.rows:
            return  # frozen between the forward and the backward pass
        expected = self._expected[key]
        if expected == 1 and origin is None:
            self._hold(key, term)
            return
        pending = self._pending.setdefault(key, [])
        pending.append((origin, term))
        if len(pending) == expected:
            self._finish(key)

    def _finish(self, key: int) -> None:
        parameter, alike = self.parameters[self.rows[key]], self._alike.get(key, ())
        with recomputed_once():
            self._hold(key, derived_term(self._pending.pop(key), parameter, self._joined_uses, alike))

    def _hold(self, key: int, term: Term, squared: Tensor | None = None) -> None:
        """Take the norms of the one term of a parameter, if they are not known yet, and keep it if it is wanted."""
        if self.keep:
            self.terms[key] = term = term.compact()
        if self.norms:
            self.squared[self.rows[key]] = term.squared_norm() if squared is None else squared

    def _correct(self, terms: dict[str, Term], call: Call, batch_norm: Call) -> None:
        """Attach the local correction where it is exact: to the parameters that this call alone uses."""
        sums = self._batch_norm_sums.pop(id(batch_norm), None)
        alone = [key for key, parameter in call.parameters.items() if self._expected[id(parameter)] == 1]
        if sums is not None:
            mean, rstd = batch_norm.saved
            statistics = BatchNormCall(batch_norm.activations(), mean, rstd, self._gains[id(batch_norm)])
            correct_terms({key: terms[key] for key in alone}, statistics, *sums)

    # -- results ---------------------------------------------------------------------------------------------

    def squared_norms(self, like: Tensor) -> Tensor:
        """All squared norms, ``[L, n]``; parameters that were not reached have zero rows.

        Args:
            like: the losses ``[n]``.
        """
        dtype = accumulation_dtype(like)
        if not self.squared:
            return torch.zeros(0, self.n, dtype=dtype, device=like.device)
        rows = [row for row in self.squared if row is not None]
        if len(rows) < len(self.squared):
            zero = torch.zeros(self.n, dtype=dtype, device=like.device)
            rows = [zero if row is None else row for row in self.squared]
        found = torch.stack([row if row.dtype == dtype else row.to(dtype) for row in rows])
        if self._drawn is not None:
            found = found / self._drawn.to(dtype).square()
        if self.graph.plan.lost:
            return torch.full_like(found, torch.nan)
        # Where a gradient that was not finite kept the plan from knowing its owner, the loss tells.
        return found + like.detach().to(dtype) * 0 if self.graph.plan.blind else found

    def weighted_sums(
        self, weights: Tensor, only: set[int] | None = None, *, again: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """``(parameter, sum_i weights_i g_i)`` for every parameter reached; terms are dropped as they are used.

        Args:
            weights: ``[n]``.
            only: ids of the parameters to sum for; default all.
            again: keep the terms.
        """
        terms = self.terms
        weights = weights if self._drawn is None else weights / self._drawn.to(weights.dtype)
        keys = sorted(terms.keys() if only is None else only & terms.keys(), key=self.rows.__getitem__)
        reached = [(self.parameters[self.rows[key]], terms[key] if again else terms.pop(key)) for key in keys]
        return weighted_sums(reached, weights, SCALED_AT_ONCE["cuda" if weights.is_cuda else "cpu"])


def powers_of_two(losses: Tensor) -> Tensor:
    """A factor from 1 to :data:`LARGEST_POWER` for every loss, ``[n]``, another one than its neighbours'."""
    numbers = torch.arange(losses.shape[0], device=losses.device)
    # The fractional part of multiples of the golden ratio, of which the first three bits count.
    powers = ((numbers * 2654435769) & 0xFFFFFFFF) >> 29
    return torch.exp2(powers.double()).to(losses.dtype)


def correctable(batch_norm: Call) -> bool:
    """Whether the call is a batch norm over the batch whose channels are the features of the layer that feeds it."""
    producer = batch_norm.producer
    if producer is None or not batch_norm.couples or not isinstance(batch_norm.rule, BatchNormRule):
        return False
    rows = isinstance(producer.rule, LinearRule) and batch_norm.activations().dim() == 2
    return rows or isinstance(producer.rule, ConvRule)
