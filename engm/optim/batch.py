"""One batch as an outer optimizer sees it: where norms come from, and how the weighted gradient is formed."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from .._C import add_gradients
from ..backward.collect import TermCollector
from ..backward.inputs import Inputs, input_gradients, input_norms, input_rows, pack_input_grads, resolve_inputs
from ..backward.norms import Measurement, calibrated_squared_norms, is_faithful, measure_graph, own_mode
from ..backward.prepare import planned_losses, takes_one_pass
from ..distributed import Ranks, backpropagate_leaves
from ..graph.plan import PlannedGraph
from ..graph.trace import trace
from ..loss_checks import check_losses
from ..module import GradNormModule
from ..terms.loss_scale import LossScale
from ..torch_internals import recomputed_once
from .weights import ExampleNorms, Source, Weighting


class LossBatch:
    """One batch's losses, and the cheapest ways to get norms, input norms and the weighted gradient from its graph.

    ==================  =========================================  ===================================
    examples            norms                                      weighted gradient
    ==================  =========================================  ===================================
    independent         from the one pass there is                 from that pass's factors
    coupled             own frozen pass, calibrated                backward of the reweighted losses
    measured before     from the measurement (calibrated if        backward of the reweighted losses
                        the training graph couples, and an own
                        pass where that is judged too far off)
    ==================  =========================================  ===================================

    Args:
        model: the wrapper.
        losses: ``[n]``.
        inputs: whose gradients are wanted, if any.
        measurement: of the same examples, if any.
        scale: on the losses.
        check: look for non-finite losses.
        captured: whether norms or input gradients will be asked for, so that the graph must be a captured one.
        use_up: whether norms of the gradients alone will be asked for, of one pass that does everything.

    Attributes:
        source: where the norms came from that were asked for last, see :class:`engm.StepStats`.

    Raises:
        TypeError, ValueError, RuntimeError: losses or measurement do not fit, see :func:`engm.measure`.
    """

    def __init__(
        self,
        model: GradNormModule,
        losses: Tensor,
        inputs: Inputs,
        measurement: Measurement | None,
        *,
        scale: LossScale,
        check: bool | None,
        captured: bool,
        use_up: bool = False,
    ) -> None:
        self.model = model
        self.losses = losses
        self.inputs = inputs
        self.measurement = measurement
        self.scale = scale
        self.source: Source | None = None
        self._collector: TermCollector | None = None
        self._to_map: Measurement | None = None  # what was measured, or handed over,
        self._found: Tensor | None = None  # and norms [n] of the input gradients
        self._graph: PlannedGraph | None = None
        if captured:
            self._graph = planned_losses(model, losses, check=check, scale=scale, use_up=use_up and measurement is None)
            self.trace = self._graph.trace
        else:
            check_losses(losses, finite=check)
            self.trace = trace(losses, model, model.trainable_parameters())
            self._check_reached()
        if measurement is not None:
            self._check_measurement(measurement)

    def _check_reached(self) -> None:
        """Refuses losses from which no gradient would come; who reads norms learns it when the graph is planned."""
        whole = self.model.shard_group is None  # else the parameters in the graph are copies, which may not be known
        if whole and not any(id(p) in self.trace.leaves for _, p in self.trace.trained):
            raise RuntimeError(
                "the losses reach no trained parameter of this model: pass the model that computed them."
            )

    def _check_measurement(self, measurement: Measurement) -> None:
        if not isinstance(measurement, Measurement):
            raise TypeError(f"measurement must come from engm.measure, got {type(measurement).__name__}.")
        names = tuple(name for name, _ in self.trace.trained)
        if measurement.n != self.losses.shape[0] or measurement.names != names:
            raise ValueError(
                f"the measurement is of {measurement.n} examples and {len(measurement.names)} parameter tensors, the "
                f"losses are of {self.losses.shape[0]} examples and {len(names)}: measure the same examples with the "
                "same trained parameters."
            )

    @property
    def ranks(self) -> Ranks | None:
        """The processes whose batches make up this one with it; None where the losses were computed by one alone."""
        return self.trace.ranks

    def check_request(self, *, of_gradients: bool, of_inputs: bool) -> None:
        """Refuses what cannot be answered by :meth:`norms`, before anything is changed.

        Raises:
            TypeError, ValueError: as :meth:`norms`.
        """
        if self._graph is None:
            return
        if self.measurement is None:
            if of_inputs:
                self._input_leaves()
            return
        if of_inputs:
            self._borrowed_input_norms(self.measurement)
        if of_gradients:
            self._check_has_norms(self.measurement)

    # -- norms -----------------------------------------------------------------------------------------------

    def measure(self, *, of_gradients: bool, of_inputs: bool, one_pass: bool) -> None:
        """Measure what is asked for, unless it was measured before; nothing is sent, nor estimated from the batch.

        Args:
            of_gradients: over the parameters.
            of_inputs: of the input gradients, of the sum of the losses, through the batch's statistics where there are
                any.
            one_pass: whether one backward pass may do everything and use the graph up, where nothing couples the
                examples and no hooks hang on parameters.

        Raises:
            ValueError: inputs are needed and there are none, or the measurement lacks what is asked for.
        """
        if self._graph is None or not (of_gradients or of_inputs):
            return
        with self.trace.still_buffers():
            self._measure(self._graph, of_gradients, of_inputs, one_pass)

    def _measure(self, graph: PlannedGraph, of_gradients: bool, of_inputs: bool, one_pass: bool) -> None:
        """See :meth:`measure`."""
        self.source = "own" if self.measurement is None else "borrowed"
        if self.measurement is not None:
            self._found = self._borrowed_input_norms(self.measurement) if of_inputs else None
            self._to_map = self.measurement if of_gradients else None
        elif one_pass and takes_one_pass(graph):
            leaves = self._input_leaves() if of_inputs else ()
            squared, self._found = self._by_one_pass(graph, of_gradients, leaves)
            if squared is not None:
                self._to_map = Measurement(graph.names, squared, "plain", self.losses.detach())
        else:
            leaves = self._input_leaves() if of_inputs else ()
            if leaves and (graph.couples or not of_gradients):
                self._found = self._input_norms(leaves, input_gradients(self.losses, leaves, self.scale))
            if of_gradients:
                inputs = self.inputs if leaves and self._found is None else None
                self._to_map = self._measured(graph, inputs)
                self._found = self._to_map.input_norms if self._found is None else self._found

    def norms(self) -> ExampleNorms:
        """The norms that were measured, mapped to those of the paper where batch norm couples examples."""
        graph, measured, squared, factors = self._graph, self._to_map, None, None
        if graph is not None and measured is not None:
            borrowed = measured is self.measurement
            squared, factors = self._calibrated(graph, measured, borrowed=borrowed)
            if borrowed and not is_faithful(self.model, graph, measured):
                self.source = "own"
                squared, factors = self._calibrated(graph, self._measured(graph), borrowed=False)
        return ExampleNorms(self.losses.detach(), squared, factors, self._found, self.ranks)

    def _by_one_pass(
        self, graph: PlannedGraph, of_gradients: bool, leaves: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Squared norms ``[L, n]`` and input norms ``[n]`` from the pass whose terms the gradient is made from."""
        self._collector = collector = TermCollector(graph, norms=of_gradients, keep=True)
        gradients: tuple[Tensor | None, ...] = ()
        squared: Tensor | None = None
        if graph.collected is not None and graph.collected.terms is not None:
            collector.terms, squared = graph.collected.terms, self.scale.off_squares(graph.collected.squared)
            graph.collected = None
        else:
            gradients = collector.run(self.losses, self.scale.seeds(self.losses), leaves, retain_graph=False)
            if of_gradients:
                squared = self.scale.off_squares(collector.squared_norms(self.losses))
        return squared, self._input_norms(leaves, gradients) if leaves else None

    def _measured(self, graph: PlannedGraph, inputs: Inputs = None) -> Measurement:
        """The norms of this very graph, by a pass of its own."""
        return measure_graph(graph, self.losses, own_mode(self.model, graph), inputs, self.scale)

    def _calibrated(
        self, graph: PlannedGraph, measurement: Measurement, *, borrowed: bool
    ) -> tuple[Tensor, Tensor | None]:
        self._check_has_norms(measurement)
        return calibrated_squared_norms(
            self.model, graph, self.losses, measurement, borrowed=borrowed, count=True, scale=self.scale
        )

    def _check_has_norms(self, measurement: Measurement) -> None:
        if measurement.stacked is None:
            raise ValueError(
                "the measurement was taken with norms=False and this step reads norms: leave norms at True (see "
                "needs_norms of the optimizer), or leave measurement out."
            )

    def _borrowed_input_norms(self, measurement: Measurement) -> Tensor:
        found = measurement.input_norms
        if found is None:
            raise ValueError(
                "the measurement has no input gradients: take it with engm.measure(model, losses, inputs=x)."
            )
        return found

    def _input_leaves(self) -> tuple[Tensor, ...]:
        if self.inputs is None:
            raise ValueError(
                "this optimizer reads the gradient of the inputs: pass them, opt.backward(losses, inputs=x_adv), or a "
                "measurement that was taken with inputs."
            )
        leaves = resolve_inputs(self.trace, self.inputs)
        if not leaves:
            raise ValueError("inputs must name at least one tensor.")
        self._input_rows = input_rows(self.model.engm_plans, self.losses, leaves, self.trace)
        return leaves

    def _input_norms(self, leaves: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...]) -> Tensor:
        """``[n]`` from gradients of the scaled losses."""
        packed = pack_input_grads(self.inputs, leaves, gradients)
        return self.scale.off_norms(
            input_norms(() if packed is None else packed, self._input_rows, self.losses.shape[0])
        )

    # -- gradient --------------------------------------------------------------------------------------------

    def accumulate(self, weighting: Weighting, divisor: float) -> None:
        """Add ``loss_scale / divisor * sum_i weights_i dL_i/dtheta`` to ``p.grad``; the graph is used up."""
        parts = self._parts(weighting)
        if self._collector is None:
            self._backpropagate(parts, divisor)
        else:  # its terms carry the loss scale already
            with recomputed_once(), self.trace.still_buffers():
                self._add_weighted_sums(self._collector, parts, divisor)
        self.release()

    def _backpropagate(self, parts: list[tuple[Tensor, set[int] | None]], divisor: float) -> None:
        """Run an ordinary backward pass of the reweighted losses, one for each part."""
        reached = [p for _, p in self.trace.trained if id(p) in self.trace.leaves]
        parts = [(weights, own) for weights, own in parts if own is None or any(id(p) in own for p in reached)]
        for i, (weights, own) in enumerate(parts):
            targets = [p for p in reached if own is None or id(p) in own]
            # Where these are all leaves that there are, autograd need not look which paths lead to them.
            every = len(targets) == len(self.trace.leaves) and not self.trace.tokens
            seeds = (weights * (self.scale.factor / divisor)).to(self.losses.dtype)
            kept = i < len(parts) - 1
            torch.autograd.backward(self.losses, seeds, inputs=None if every else targets, retain_graph=kept)

    def _add_weighted_sums(
        self, collector: TermCollector, parts: list[tuple[Tensor, set[int] | None]], divisor: float
    ) -> None:
        """Add the weighted sums of the terms that were kept."""
        zeros = self._zeros_of_reached(collector)
        sums = chain.from_iterable(collector.weighted_sums(weights / divisor, own) for weights, own in parts)
        if self.ranks is None:
            add_gradients([*zeros, *sums])  # nothing is half changed, should one of the sums fail
        else:
            backpropagate_leaves(chain(zeros, ((p, _in_form_of(p, gradient)) for p, gradient in sums)))

    def _zeros_of_reached(self, collector: TermCollector) -> list[tuple[Tensor, Tensor]]:
        """Parameters in the graph that no gradient arrived at, and 0, as autograd gives them.

        ``DistributedDataParallel`` waits for them.
        """
        reached = [p for _, p in self.trace.trained if id(p) in self.trace.leaves]
        return [(p, torch.zeros_like(p, dtype=p.grad_dtype)) for p in reached if id(p) not in collector.terms]

    def _parts(self, weighting: Weighting) -> list[tuple[Tensor, set[int] | None]]:
        """Weights ``[n]`` and the parameters (by id) that they are for; None: all."""
        if weighting.groups is None:
            return [(weighting.weights, None)]
        parameters = [parameter for _, parameter in self.trace.trained]
        return [
            (weights, {id(parameters[row]) for row in rows})
            for weights, rows in zip(weighting.weights.unbind(0), weighting.groups, strict=True)
        ]

    def release(self) -> None:
        """Let go of everything that was captured for this batch."""
        self.trace.release()


def _in_form_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the type that the parameter's gradients have, and in its shape unless it is sparse."""
    gradient = gradient.to(parameter.grad_dtype or gradient.dtype)
    return gradient if gradient.is_sparse or gradient.shape == parameter.shape else gradient.view_as(parameter)
