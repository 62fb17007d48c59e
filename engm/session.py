"""One backward pass that collects terms: no parameter gradient is computed, every captured call is visited.

The pass goes to the *sinks* of the graph (:mod:`engm.graph`), so autograd skips all weight gradients. Each call's
terms are formed when its backprops arrive, turned into squared norms as soon as all uses of the parameter are in,
and let go unless one-pass accumulation wants them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .capture import Call
from .correction import correct_terms, correctable
from .graph import Trace
from .terms import Term, UnsupportedTieError, accumulation_dtype, combine, weighted_sums

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
        idle_rows: if given, rows (bool ``[n]``) whose losses took no part; their backprops must be zero, and
            nothing else is done (strict check).
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
        idle_rows: Tensor | None = None,
    ) -> None:
        self.model = model
        self.traced = traced
        self.n = n
        self.views = model.views
        self.norms = norms
        self.keep = keep
        self.correct = correct
        self.idle_rows = idle_rows
        self.names = [name for name, _ in model.trainable_parameters()]
        parameters = [parameter for _, parameter in model.trainable_parameters()]
        self.rows = {id(parameter): row for row, parameter in enumerate(parameters)}
        self.parameters = parameters
        self.squared = [None] * len(parameters)  # type: list[Tensor | None]
        self.terms: dict[int, Term] = {}
        self._consume = False  # the graph is freed as the pass goes; let go of activations with it
        self._pending: dict[int, list[Term]] = {}
        self._expected: dict[int, int] = {}
        self._batch_norm_of: dict[int, Call] = {}  # id(producer) -> its batch norm
        self._batch_norm_sums: dict[int, tuple[Tensor, Tensor]] = {}  # id(batch norm call) -> shift, scale gradients
        for call in traced.calls:
            if call.capture.owner is not model:
                continue
            for parameter in call.parameters.values():
                self._expected[id(parameter)] = self._expected.get(id(parameter), 0) + self.views
            if correct and self.views == 1 and correctable(call):
                self._batch_norm_of[id(call.producer)] = call
        self._feeding = {id(batch_norm) for batch_norm in self._batch_norm_of.values()}

    # -- running ---------------------------------------------------------------------------------------------

    def run(
        self, losses: Tensor, weights: Tensor, inputs: Sequence[Tensor] = (), *, frozen: bool, retain_graph: bool
    ) -> tuple[Tensor | None, ...]:
        """Backpropagate ``sum_i weights_i losses_i`` to the sinks and ``inputs``; returns the inputs' gradients."""
        targets: list[Any] = [*self.traced.sinks, *inputs]
        self._consume = not retain_graph
        with self._collecting(frozen):
            gradients = torch.autograd.grad(losses, targets, weights, retain_graph=retain_graph, allow_unused=True)
        for key in list(self._pending):  # a use that got no gradient at all never arrived
            self._finish(key)
        return gradients[len(self.traced.sinks) :]

    @contextmanager
    def _collecting(self, frozen: bool) -> Iterator[None]:
        captures = {id(call.capture): call.capture for call in self.traced.calls}
        if any(capture.session is not None for capture in captures.values()):
            raise RuntimeError("engm: this graph is being measured already (a measurement inside a backward hook?).")
        for call in self.traced.calls:
            call.put_hook_last()
        try:
            for capture in captures.values():
                capture.session, capture.frozen = self, frozen
            yield
        finally:
            for capture in captures.values():
                capture.session, capture.frozen = None, False

    # -- collecting ------------------------------------------------------------------------------------------

    def receive(self, call: Call, backprops: Tensor) -> None:
        """Take the gradient of one call's output; called from its tensor hook."""
        if call.capture.owner is not self.model:
            return
        backprops = backprops.detach()
        rows = self.n * self.views
        if backprops.dim() == 0 or backprops.shape[0] != rows:
            raise RuntimeError(self._wrong_batch(call, backprops))
        if self.idle_rows is not None:
            self._check_idle_rows(call, backprops, self.idle_rows)
            return
        corrected = self._batch_norm_of.get(id(call))
        feeds_correction = id(call) in self._feeding
        if not call.parameters and not feeds_correction:
            return
        activations = call.activations() if call.reads else backprops  # a stand-in that nobody reads
        names = ("weight", "bias") if feeds_correction else tuple(call.parameters)
        for view in range(self.views):
            part = slice(view * self.n, (view + 1) * self.n)
            whole = self.views == 1
            terms = call.rule.terms(
                call.module,
                activations if whole else activations[part],
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
                self._add(parameter, terms[key])
        if self._consume:
            call.release()

    def _add(self, parameter: Tensor, term: Term) -> None:
        key = id(parameter)
        if key not in self.rows:
            return  # frozen between the forward and the backward pass
        pending = self._pending.setdefault(key, [])
        pending.append(term)
        if len(pending) == self._expected[key]:
            self._finish(key)

    def _finish(self, key: int) -> None:
        terms = self._pending.pop(key)
        name = self.names[self.rows[key]]
        try:
            term = combine(terms, name)
        except UnsupportedTieError as error:
            raise RuntimeError(f"engm: {error}") from None
        if self.keep:
            term = term.compact()
        if self.norms:
            self.squared[self.rows[key]] = term.squared_norm()
        if self.keep:
            self.terms[key] = term

    def _correct(self, terms: dict[str, Term], call: Call, batch_norm: Call) -> None:
        """Attach the local correction where it is exact: to the parameters that this call alone uses."""
        sums = self._batch_norm_sums.pop(id(batch_norm), None)
        alone = [key for key, parameter in call.parameters.items() if self._expected[id(parameter)] == 1]
        if sums is not None:
            correct_terms({key: terms[key] for key in alone}, batch_norm, *sums)

    def _check_idle_rows(self, call: Call, backprops: Tensor, idle_rows: Tensor) -> None:
        idle = backprops.reshape(self.views, self.n, -1)[:, idle_rows]
        if bool(((idle != 0) & ~idle.isnan()).any()):  # 0 times a NaN or an infinity says nothing about influence
            raise RuntimeError(
                f"engm: the output of layer '{call.name}' ({type(call.module).__name__}) for some examples "
                "influences the losses of other examples, so per-example gradients are not defined there. Something "
                "between this layer and the losses mixes the batch (x - x.mean(0), a batch statistic outside "
                "nn.BatchNorm, losses in another order than the inputs, a layout whose first dimension is not the "
                "batch). Replace it, or wrap with strict=False if you know that the mixing does not matter."
            )

    def _wrong_batch(self, call: Call, backprops: Tensor) -> str:
        message = (
            f"engm: the output of layer '{call.name}' ({type(call.module).__name__}) has shape "
            f"{tuple(backprops.shape)}, but there are {self.n} losses"
        )
        if self.views > 1:
            message += f" and views={self.views}, so its first dimension must be {self.n * self.views}"
        message += ". Examples must lie along the first dimension, one loss each"
        if backprops.dim() and self.n and backprops.shape[0] % self.n == 0 and self.views == 1:
            message += (
                f"; if every example has {backprops.shape[0] // self.n} rows, as in model(torch.cat([x, x_adv])), "
                f"wrap with GradNormModule(net, views={backprops.shape[0] // self.n})"
            )
        return message + "."

    # -- results ---------------------------------------------------------------------------------------------

    def squared_norms(self, like: Tensor) -> Tensor:
        """All squared norms, ``[L, n]``; parameters that were not reached have zero rows."""
        dtype = accumulation_dtype(like)
        zero = torch.zeros(self.n, dtype=dtype, device=like.device)
        if not self.squared:
            return zero.new_zeros(0, self.n)
        return torch.stack([zero if row is None else row.to(dtype) for row in self.squared])

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
