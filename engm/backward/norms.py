"""Squared norms from a planned graph: measured in one backward pass, mapped to the paper's where examples couple."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..batch_norm.factors import FactorKey
from ..checks import RefusedError
from ..exact import exact_squared_norms
from ..graph.plan import PlannedGraph
from ..module import GradNormModule
from ..module import couples as may_couple
from ..terms.loss_scale import UNSCALED, LossScale
from ..terms.owners import Ownership
from .collect import TermCollector
from .inputs import Inputs, input_gradients, input_norms, input_rows, resolve_inputs, unscaled_inputs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Measurement:
    """Per-example squared gradient norms, and input gradients if asked for, from one backward pass.

    Attributes:
        names: the parameter tensors, in the order of the network.
        stacked: squared norms ``[L, n]``, one row a parameter tensor; float64 for float64 losses, else float32. None if
            only input gradients were measured (``norms=False``).
        mode: how batch statistics were treated: ``"plain"`` (nothing couples the examples: the norms are exact),
            ``"frozen"`` (batch norms in training mode as constants), ``"corrected"`` (the same, with the local
            correction of :mod:`engm.batch_norm.correction`; never from :func:`engm.measure`) or ``"exact"`` (through
            the statistics, as input gradients always are).
        losses: ``[n]``, detached.
        input_grads: gradient of the summed losses with respect to ``inputs``, same structure; None if not asked for.
        input_rows: in which rows of each of the inputs the examples lie.
        scaled_norms: ``[n]``, norms of the input gradients that were taken before the loss scale was divided out, where
            there was one: what is small in float16 is gone behind that.
    """

    names: tuple[str, ...]
    stacked: Tensor | None
    mode: str
    losses: Tensor
    input_grads: Tensor | tuple[Tensor, ...] | None = None
    input_rows: tuple[Ownership, ...] = ()
    scaled_norms: Tensor | None = None

    @property
    def squared_norms(self) -> dict[str, Tensor]:
        """Squared norms ``[n]`` by parameter name."""
        return dict(zip(self.names, self.require_stacked().unbind(0), strict=True))

    @property
    def norms(self) -> Tensor:
        """``[n]``, norms over all parameters, of the graph the measurement ran on (not calibrated)."""
        return self.require_stacked().sum(0).sqrt()

    def require_stacked(self) -> Tensor:
        """``stacked``.

        Raises:
            ValueError: only input gradients were measured.
        """
        if self.stacked is None:
            raise ValueError("this measurement was taken with norms=False: it has input gradients only.")
        return self.stacked

    @property
    def input_norms(self) -> Tensor | None:
        """``[n]``, norms of the input gradients over everything but the example; None without ``inputs``."""
        if self.input_grads is None or self.scaled_norms is not None:
            return self.scaled_norms
        return input_norms(self.input_grads, self.input_rows, self.n)

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.losses.shape[0]


def lent_mode(model: GradNormModule, graph: PlannedGraph) -> str:
    """The mode of a measurement that may be handed on to another graph (see :class:`Measurement`).

    It is never ``"corrected"``: the local correction belongs to the graph that it was computed on.
    """
    if not graph.couples:
        return "plain"
    return "exact" if model.batch_norm == "exact" else "frozen"


def own_mode(model: GradNormModule, graph: PlannedGraph) -> str:
    """The mode of a measurement on the training graph itself (see :class:`Measurement`)."""
    mode = lent_mode(model, graph)
    return "corrected" if mode == "frozen" and model.batch_norm == "calibrated" else mode


def measure_graph(
    graph: PlannedGraph,
    losses: Tensor,
    mode: str,
    inputs: Inputs = None,
    scale: LossScale = UNSCALED,
) -> Measurement:
    """One backward pass that computes no weight gradient and keeps the graph; two for inputs where examples couple.

    Args:
        graph: behind ``losses``.
        losses: ``[n]``.
        mode: how to treat batch statistics, from :func:`lent_mode` or :func:`own_mode`.
        inputs: tensors whose gradients are wanted too.
        scale: on the losses inside the pass.

    Raises:
        RuntimeError: exact gradients would be needed where the examples of several processes are one batch.
        TypeError, ValueError: the inputs do not fit.
    """
    leaves = resolve_inputs(graph.trace, inputs)
    rows = input_rows(graph.plans, losses, leaves, graph.trace)
    with graph.trace.still_buffers():
        stacked, gradients = _measured(graph, losses, mode, inputs, leaves, scale)
    packed, norms = unscaled_inputs(inputs, leaves, gradients, rows, losses.shape[0], scale)
    return Measurement(graph.names, stacked, mode, losses.detach(), packed, rows, norms)


def _measured(
    graph: PlannedGraph, losses: Tensor, mode: str, inputs: Inputs, leaves: Sequence[Tensor], scale: LossScale
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Squared norms ``[L, n]``, and the gradients of ``leaves``; see :func:`measure_graph`."""
    if mode in ("exact", "corrected"):
        _refuse_other_ranks(graph)
    if mode == "exact":
        stacked = exact_squared_norms(losses, graph.parameters, scale=scale)
        gradients = input_gradients(losses, leaves, scale)
    elif mode != "corrected" and inputs is None and graph.collected is not None:
        stacked, gradients = scale.off_squares(graph.collected.squared), ()
    else:
        # An attack that borrows must climb the loss that it would climb without: through the batch's statistics.
        through = graph.couples  # hence as many passes on all ranks
        collector = TermCollector(graph, correct=mode == "corrected")
        gradients = collector.run(losses, scale.seeds(losses), () if through else leaves, retain_graph=True)
        gradients = input_gradients(losses, leaves, scale) if through else gradients
        stacked = scale.off_squares(collector.squared_norms(losses))
    return stacked, gradients


def calibrated_squared_norms(
    model: GradNormModule,
    graph: PlannedGraph,
    losses: Tensor,
    measurement: Measurement,
    *,
    borrowed: bool,
    count: bool,
    scale: LossScale = UNSCALED,
) -> tuple[Tensor, Tensor | None]:
    """``([L, n] squared norms, [L] factors)`` of a measurement, as norms of the training graph behind ``losses``.

    The factors are None where none are called for: nothing couples the examples, or the model asks for raw or exact
    norms. Those of a training step under ``DistributedDataParallel`` are taken by all ranks together, which all have to
    call this then, whether or not their own examples are coupled; outside of training steps and under ``no_sync``
    nothing is sent. Under ``fully_shard`` all ranks always have to.

    Args:
        model: whose calibration it is.
        graph: behind ``losses``.
        losses: ``[n]``, of the training graph.
        measurement: of the same examples.
        borrowed: whether the measurement is of another graph, as an attack's last step.
        count: whether this is a training step, which replaces factors that are too old.
        scale: on the losses inside the exact passes.

    Raises:
        ValueError: an exact norm is asked for and the measurement is of another graph.
        RuntimeError: the examples of several processes are one batch.
    """
    stacked = measurement.require_stacked()
    if model.batch_norm == "frozen" or measurement.mode == "exact":
        return stacked, None
    if not _calibrates(model, graph, count):
        return stacked, None
    if model.batch_norm == "exact":
        raise ValueError(
            "batch_norm='exact' takes norms through the statistics of the training graph; a measurement of another "
            "graph cannot give them. Leave measurement out, or wrap with batch_norm='calibrated'."
        )
    _refuse_other_ranks(graph)
    with graph.trace.still_buffers():
        factors = model.calibration.factors(
            FactorKey(measurement.mode, borrowed),
            stacked,
            losses,
            graph.trace.trained,
            count=count and _reduces(graph),
            scale=scale,
            group=_calibrating_group(model, graph, count),
            in_step=model.shard_group is not None,
            couples=graph.plan.couples,
            leaves=None if model.shard_group is not None else graph.trace.leaves,
            surprises=graph.surprises,
        )
    return stacked, factors


def is_faithful(model: GradNormModule, graph: PlannedGraph, measurement: Measurement) -> bool:
    """Whether a borrowed measurement, which was calibrated in this training step, may be used for it.

    It may be unless its weights were judged to be more than ``model.calibration.most_error`` off. All ranks that take
    factors together get the same answer.
    """
    if model.batch_norm != "calibrated" or not _calibrates(model, graph, True):
        return True
    key, group = FactorKey(measurement.mode, True), _calibrating_group(model, graph, True)
    return model.calibration.faithful(key, group, count=_reduces(graph), couples=graph.plan.couples)


def _calibrates(model: GradNormModule, graph: PlannedGraph, count: bool) -> bool:
    """Whether examples are coupled: these, or those of other ranks, which then wait for this one's word."""
    if graph.plan.couples:
        return True
    together = model.batch_norm == "calibrated" and _calibrating_group(model, graph, count) is not None
    return together and (may_couple(model) or model.calibration.is_shared)


def _calibrating_group(model: GradNormModule, graph: PlannedGraph, count: bool) -> ProcessGroup | None:
    """The ranks that take factors together; None where this process does alone."""
    ranks = graph.trace.ranks
    if ranks is None or (ranks.joining and not graph.plan.couples):
        return None
    together = model.shard_group is not None or (count and ranks.reduces)
    return ranks.estimating_group() if together else None


def _reduces(graph: PlannedGraph) -> bool:
    """Whether the step behind the graph is one of all ranks, if there are several."""
    return graph.trace.ranks is None or graph.trace.ranks.reduces


def mapped_norms(stacked: Tensor, factors: Tensor | None) -> Tensor:
    """Norms ``[n]`` over all parameter tensors from squared norms ``[L, n]`` and factors ``[L]``, if there are any."""
    if factors is not None:
        stacked = stacked * factors.unsqueeze(1)
    return stacked.sum(0).sqrt()


def _refuse_other_ranks(graph: PlannedGraph) -> None:
    """Exact gradients of a few examples cannot be taken where the examples of several processes are one batch.

    Raises:
        RuntimeError: ``nn.SyncBatchNorm`` over several processes.
    """
    if graph.plan.of_all_ranks:
        raise RefusedError(
            "engm: nn.SyncBatchNorm over several processes couples the examples of all of them, and the exact "
            "gradients that calibration takes of a few would be mixed with those of other processes. Wrap with "
            "GradNormModule(net, batch_norm='frozen'), or leave nn.BatchNorm in place."
        )
