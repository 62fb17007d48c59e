"""One backward pass that collects terms: no parameter gradient is computed, every use of a parameter is visited.

The pass goes to the *sinks* of the graph (:mod:`engm.plan`), so autograd skips all weight gradients. The terms of a
call, or of a tensor that enters outside of calls, are formed when its backprops arrive, turned into squared norms as
soon as all uses of the parameter are in, and let go unless one-pass accumulation wants them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .capture import Call
from .correction import correct_terms, correctable
from .derived import Origin, derived_term
from .graph import Trace
from .layout import PLAIN, Layout
from .passes import collecting, frozen_statistics
from .plan import PlannedEntry
from .rules.operators import entry_term, masked_gradients
from .terms import Term, accumulation_dtype, weighted_sums

if TYPE_CHECKING:
    from .module import GradNormModule

# On CUDA, where a launch for every layer would cost more than its work: 64 MB take 40 µs to scale. The CPU scales one
# factor at a time and needs no more memory than the largest of them.
SCALED_AT_ONCE = 64 << 20


class Session:
    """Collects squared norms, terms, or both, from one backward pass.

    Args:
        model: the wrapper whose parameters are measured.
        traced: the graph behind the losses.
        n: number of examples.
        norms: compute squared norms.
        keep: keep the terms for :meth:`weighted_sums`.
        correct: apply the local batch-norm correction where a layer feeds a batch norm directly.
    """

    def __init__(
        self,
        model: GradNormModule,
        traced: Trace,
        n: int,
        *,
        norms: bool = True,
        keep: bool = False,
        correct: bool = False,
    ) -> None:
        self.model = model
        self.traced = traced
        self.n = n
        self.views = model.views
        self.norms = norms
        self.keep = keep
        parameters = [parameter for _, parameter in traced.trained]
        self.rows = {id(parameter): row for row, parameter in enumerate(parameters)}
        self.parameters = parameters
        self.squared = [None] * len(parameters)  # type: list[Tensor | None]
        self.terms: dict[int, Term] = {}
        self._consume = False  # the graph is freed as the pass goes; let go of activations with it
        self._pending: dict[int, list[tuple[Origin | None, Term]]] = {}
        self._expected: dict[int, int] = {}
        self.plan = traced.require_plan()
        self._deferred: list[tuple[PlannedEntry, list[Tensor | None]]] = []
        self._layouts: dict[int, Layout] = {}  # id(call) -> of its output; none for a call that sees no batch
        self._batch_norm_of: dict[int, Call] = {}  # id(producer) -> its batch norm
        self._batch_norm_sums: dict[int, tuple[Tensor, Tensor]] = {}  # id(batch norm call) -> shift, scale gradients
        for call, layout in zip(traced.calls, self.plan.layouts, strict=True):
            if call.capture.owner is not model or layout is None:
                continue
            self._layouts[id(call)] = layout
            for parameter in call.parameters.values():
                by_view = layout == self._announced and not call.rule.whole_call
                self._expect(id(parameter), self.views if by_view else 1)
            if correct and layout.plain and correctable(call):
                self._batch_norm_of[id(call.producer)] = call
        for entry in self.plan.entries:
            for source in entry.sources:
                self._expect(source.parameter, 1)
        self._feeding = {id(batch_norm) for batch_norm in self._batch_norm_of.values()}

    @property
    def _announced(self) -> Layout:
        """Where the examples lie in ``views`` repetitions of the batch."""
        return Layout(0, self.views, 1)

    def _expect(self, key: int, uses: int) -> None:
        self._expected[key] = self._expected.get(key, 0) + uses

    # -- running ---------------------------------------------------------------------------------------------

    def run(
        self, losses: Tensor, weights: Tensor, inputs: Sequence[Tensor] = (), *, frozen: bool, retain_graph: bool
    ) -> tuple[Tensor | None, ...]:
        """Backpropagate ``sum_i weights_i losses_i`` to the sinks and ``inputs``; returns the inputs' gradients."""
        sinks = [self.traced.edge(position, number) for position, number in self.plan.sinks]
        targets: list[Any] = [*sinks, *inputs]
        self._consume = not retain_graph
        retain_graph = retain_graph or not all(entry.ruled for entry in self.plan.entries)
        captured, passed = self._entries_by_node()
        statistics = frozen_statistics(self.traced, self.plan.couplings) if frozen else nullcontext()
        with collecting(self.traced, self), statistics, self._watching(passed):
            gradients: Sequence[Tensor | None] = ()
            if targets:
                gradients = torch.autograd.grad(losses, targets, weights, retain_graph=retain_graph, allow_unused=True)
        for position, entries in captured.items():
            outputs = {number: gradients[k] for k, (sink, number) in enumerate(self.plan.sinks) if sink == position}
            self._enter(entries, [outputs[number] for number in sorted(outputs)])
        for entry, arrived in self._deferred:
            self._take(entry, masked_gradients(entry.at(self.traced, self.n), arrived))
        self._deferred.clear()
        for key in list(self._pending):  # a use that got no gradient at all never arrived
            self._finish(key)
        return tuple(gradients[len(sinks) :])

    def _entries_by_node(self) -> tuple[dict[int, list[PlannedEntry]], dict[int, list[PlannedEntry]]]:
        """Entries by position: those at sinks, whose gradients autograd hands out without running the node; others."""
        sinks = {position for position, _ in self.plan.sinks}
        captured: dict[int, list[PlannedEntry]] = {}
        passed: dict[int, list[PlannedEntry]] = {}
        for entry in self.plan.entries:
            found = captured if entry.position in sinks else passed
            found.setdefault(entry.position, []).append(entry)
        return captured, passed

    @contextmanager
    def _watching(self, passed: dict[int, list[PlannedEntry]]) -> Iterator[None]:
        """Hooks on the nodes of entries that the pass runs through."""
        handles = []
        try:
            for position, entries in passed.items():
                handles.append(self.traced.order[position].register_prehook(partial(self._enter, entries)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- collecting ------------------------------------------------------------------------------------------

    def holds(self, call: Call) -> bool:
        """Whether the operands of a call are needed beyond :meth:`receive`."""
        return self.keep or any(self._expected.get(id(p), 0) > 1 for p in call.parameters.values())

    def receive(self, call: Call, backprops: Any) -> None:
        """Take the gradient of one call's output; called from its tensor hook."""
        if call.capture.owner is not self.model:
            return
        layout = self._layouts.get(id(call))
        if layout is None:
            return
        if call.rule.whole_call:
            self._receive_whole(call, layout, backprops)
            return
        backprops = backprops.detach()
        if backprops.numel() == 0:
            return
        if call.rule.misses_batch(call.module, backprops):
            raise RuntimeError(
                f"engm: layer '{call.name}' ({type(call.module).__name__}) was called without a batch dimension (its "
                f"output has shape {tuple(backprops.shape)}), so there are no examples in it. Give it x.unsqueeze(0)."
            )
        corrected = self._batch_norm_of.get(id(call))
        feeds_correction = id(call) in self._feeding
        if not call.parameters and not feeds_correction:
            return
        activations = call.activations() if call.reads else backprops  # a stand-in that nobody reads
        if layout not in (PLAIN, self._announced):
            self._receive_rows(call, layout, activations, backprops)
            return
        names = ("weight", "bias") if feeds_correction else tuple(call.parameters)
        for view in range(self.views):
            part = slice(view * self.n, (view + 1) * self.n)
            whole = self.views == 1
            terms = call.rule.terms(
                call.module,
                activations if whole or isinstance(activations, tuple) else activations[part],
                backprops if whole else backprops[part],
                call.saved,
                part,
                names,
            )
            if feeds_correction:
                scale, shift = (terms[name].gradient for name in ("weight", "bias"))  # type: ignore[attr-defined]
                self._batch_norm_sums[id(call)] = (shift, scale)
            if corrected is not None:
                self._correct(terms, call, corrected)
            for key, parameter in call.parameters.items():
                self._add(id(parameter), None, terms[key])
        if self._consume:
            call.release()

    def _receive_whole(self, call: Call, layout: Layout, backprops: Sequence[Tensor | None]) -> None:
        """A call whose rule arranges its examples by itself."""
        given = tuple(None if gradient is None else gradient.detach() for gradient in backprops)
        self._add_folded(call, layout, call.activations(), given)

    def _receive_rows(self, call: Call, layout: Layout, activations: Tensor, backprops: Tensor) -> None:
        """A call with several rows an example."""
        flat = layout.flattened(tuple(backprops.shape))
        if layout.dim == 1:
            activations, backprops = (t.flatten(0, 1) for t in (activations, backprops))
        self._add_folded(call, flat, activations, backprops)

    def _add_folded(self, call: Call, layout: Layout, activations: Any, backprops: Any) -> None:
        """Form the terms of a call row by row, and add those of an example."""
        every = slice(0, self.n * layout.rows)
        terms = call.rule.terms(call.module, activations, backprops, call.saved, every, tuple(call.parameters))
        for key, parameter in call.parameters.items():
            self._add(id(parameter), None, terms[key].fold(layout.outer, self.n, layout.inner))
        if self._consume:
            call.release()

    def _enter(self, entries: list[PlannedEntry], gradients: Sequence[Tensor | None]) -> None:
        """Take the gradients of the outputs of a node by which shared tensors enter."""
        if all(gradient is None for gradient in gradients):
            return
        for entry in entries:
            term = entry_term(entry.at(self.traced, self.n), gradients)
            if term is None:
                self._deferred.append((entry, [None if g is None else g.detach() for g in gradients]))
            else:
                self._take(entry, term)

    def _take(self, entry: PlannedEntry, term: Term) -> None:
        """Add the term of a shared tensor to those of the parameters that it was computed from."""
        child, number = entry.at(self.traced, self.n).child
        for source in entry.sources:
            origin = Origin(child, number, source.rearranged)
            self._add(source.parameter, None if origin.is_leaf else origin, term)

    def _add(self, key: int, origin: Origin | None, term: Term) -> None:
        if key not in self.rows:
            return  # frozen between the forward and the backward pass
        pending = self._pending.setdefault(key, [])
        pending.append((origin, term))
        if len(pending) == self._expected[key]:
            self._finish(key)

    def _finish(self, key: int) -> None:
        row = self.rows[key]
        term = derived_term(self._pending.pop(key), self.parameters[row])
        if self.keep:
            term = term.compact()
        if self.norms:
            self.squared[row] = term.squared_norm()
        if self.keep:
            self.terms[key] = term

    def _correct(self, terms: dict[str, Term], call: Call, batch_norm: Call) -> None:
        """Attach the local correction where it is exact: to the parameters that this call alone uses."""
        sums = self._batch_norm_sums.pop(id(batch_norm), None)
        alone = [key for key, parameter in call.parameters.items() if self._expected[id(parameter)] == 1]
        if sums is not None:
            correct_terms({key: terms[key] for key in alone}, batch_norm, *sums)

    # -- results ---------------------------------------------------------------------------------------------

    def squared_norms(self, like: Tensor) -> Tensor:
        """All squared norms, ``[L, n]``; parameters that were not reached have zero rows."""
        dtype = accumulation_dtype(like)
        zero = torch.zeros(self.n, dtype=dtype, device=like.device)
        if not self.squared:
            return zero.new_zeros(0, self.n)
        return torch.stack(
            [zero if row is None else row if row.dtype == dtype else row.to(dtype) for row in self.squared]
        )

    def weighted_sums(self, weights: Tensor, only: set[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """``(parameter, sum_i weights_i g_i)`` for every parameter reached; terms are dropped as they are used.

        Args:
            weights: ``[n]``.
            only: ids of the parameters to sum for; default all.
        """
        reached: list[tuple[Tensor, Term]] = []
        for parameter in self.parameters:
            if id(parameter) in self.terms and (only is None or id(parameter) in only):
                reached.append((parameter, self.terms.pop(id(parameter))))
        return weighted_sums(reached, weights, SCALED_AT_ONCE if weights.is_cuda else 0)
