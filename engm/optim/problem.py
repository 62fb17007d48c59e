"""One batch as an outer optimizer sees it: where norms come from, and how the weighted gradient is formed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..distributed import Ranks, backpropagate_leaves, group_of, ranks_of
from ..exact import check_losses
from ..graph import trace
from ..measurement import (
    Inputs,
    Measurement,
    calibrated_squared_norms,
    input_gradients,
    input_norms,
    measure_traced,
    pack_input_grads,
    resolve_inputs,
    traced_losses,
)
from ..module import GradNormModule
from ..session import Session

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Weighting:
    """What an optimizer decided for one batch; the fields are those of :class:`engm.optim.StepStats`."""

    weights: Tensor
    norms: Tensor | None = None
    input_norms: Tensor | None = None
    groups: Sequence[Sequence[int]] | None = None  # rows of parameters, where weights are [groups, n]


class Problem:
    """One batch's losses, and the cheapest ways to get norms, input norms and the weighted gradient from its graph.

    ==================  =========================================  ===================================
    examples            norms                                      weighted gradient
    ==================  =========================================  ===================================
    independent         from the one pass there is                 from that pass's factors
    coupled             own frozen pass, calibrated                backward of the reweighted losses
    measured before     from the measurement (calibrated if        backward of the reweighted losses
                        the training graph couples)
    ==================  =========================================  ===================================

    Args:
        model: the wrapper.
        losses: ``[n]``.
        inputs: whose gradients are wanted, if any.
        measurement: of the same examples, if any.
        loss_scale: on the losses.
        check: look for non-finite losses.
        captured: whether norms or input gradients will be asked for, so that the graph must be a captured one.

    Attributes:
        one_pass: whether one backward pass may do everything and free the graph, where nothing couples the examples.
    """

    def __init__(
        self,
        model: GradNormModule,
        losses: Tensor,
        inputs: Inputs,
        measurement: Measurement | None,
        *,
        loss_scale: float,
        check: bool | None,
        captured: bool,
    ) -> None:
        self.model = model
        self.losses = losses
        self.inputs = inputs
        self.measurement = measurement
        self.loss_scale = loss_scale
        self.one_pass = False
        self._session: Session | None = None
        if captured:
            self.traced = traced_losses(model, losses, check=check)
        else:
            check_losses(losses, finite=check)
            self.traced = trace(losses, model.trainable_parameters())
        if measurement is not None:
            self._check_measurement(measurement)

    def _check_measurement(self, measurement: Measurement) -> None:
        if not isinstance(measurement, Measurement):
            raise TypeError(f"measurement must come from engm.measure, got {type(measurement).__name__}.")
        names = tuple(name for name, _ in self.traced.trained)
        if measurement.n != self.losses.shape[0] or measurement.names != names:
            raise ValueError(
                f"the measurement is of {measurement.n} examples and {len(measurement.names)} parameter tensors, the "
                f"losses are of {self.losses.shape[0]} examples and {len(names)}: measure the same examples with the "
                "same trained parameters."
            )

    @property
    def ranks(self) -> Ranks | None:
        """The processes whose batches make up this one with it; None where the losses were computed by one alone."""
        return ranks_of(self.model, self.traced.captures())

    @property
    def group(self) -> ProcessGroup | None:
        """Their process group, to estimate from all of their batches."""
        return group_of(self.model, self.traced.captures())

    # -- norms -----------------------------------------------------------------------------------------------

    def clipped(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Norms ``[n]`` and ``min(alpha / norm, 1)``, ``[n]``."""
        stacked, factors, _ = self._norms(with_inputs=False)
        return ops.clip_weights(stacked, alpha, factors)

    def clipped_by_group(self, groups: Sequence[Tensor], alphas: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        """The same for every group of parameter rows (indices on the losses' device), each with its own bound."""
        stacked, factors, _ = self._norms(with_inputs=False)
        return [
            ops.clip_weights(stacked[rows], alpha, None if factors is None else factors[rows])
            for rows, alpha in zip(groups, alphas, strict=True)
        ]

    def norms(self) -> Tensor:
        """Norms ``[n]``."""
        return self.clipped(inf)[0]

    def norms_and_input_norms(self) -> tuple[Tensor, Tensor]:
        """Norms ``[n]`` and input norms ``[n]`` of the same batch."""
        stacked, factors, found = self._norms(with_inputs=True)
        norms, _ = ops.clip_weights(stacked, inf, factors)
        return norms, found  # type: ignore[return-value]

    def input_norms(self) -> Tensor:
        """Input norms ``[n]``, of the sum of the losses, through the batch's statistics where there are any."""
        if self.measurement is not None:
            found = self.measurement.input_norms
            if found is None:
                raise ValueError(
                    "the measurement has no input gradients: take it with engm.measure(model, losses, inputs=x)."
                )
            return found
        leaves = self._input_leaves()
        if self.traced.couples or not self.one_pass:
            gradients = input_gradients(self.losses, leaves, self.loss_scale)
        else:
            gradients = self._one_pass(norms=False, leaves=leaves)
        return self._norms_of_inputs(leaves, gradients)

    def _norms(self, *, with_inputs: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Squared norms ``[L, n]``, factors, and input norms if wanted.

        Input norms come first: a fault of the inputs must show before calibration takes notice of this batch.
        """
        if self.measurement is not None:
            if self.measurement.stacked is None:
                raise ValueError(
                    "the measurement was taken with norms=False and this step reads norms: leave norms at True (see "
                    "needs_norms of the optimizer), or leave measurement out."
                )
            found = self.input_norms() if with_inputs else None
            return *self._calibrated(self.measurement, borrowed=True), found
        leaves = self._input_leaves() if with_inputs else ()
        if self.traced.couples or not self.one_pass:
            coupled = self.traced.couples
            found = self.input_norms() if with_inputs and coupled else None
            measured = measure_traced(
                self.model,
                self.traced,
                self.losses,
                self.inputs if with_inputs and not coupled else None,
                self.loss_scale,
                correct=self.model.batch_norm == "calibrated",
            )
            pair = self._calibrated(measured, borrowed=False)
            return *pair, measured.input_norms if found is None else found
        gradients = self._one_pass(norms=True, leaves=leaves)
        stacked = self._session.squared_norms(self.losses) / self.loss_scale**2  # type: ignore[union-attr]
        return stacked, None, self._norms_of_inputs(leaves, gradients) if with_inputs else None

    def _calibrated(self, measurement: Measurement, *, borrowed: bool) -> tuple[Tensor, Tensor | None]:
        return calibrated_squared_norms(
            self.model,
            self.traced,
            self.losses,
            measurement,
            borrowed=borrowed,
            count=True,
            loss_scale=self.loss_scale,
        )

    def _input_leaves(self) -> tuple[Tensor, ...]:
        if self.inputs is None:
            raise ValueError(
                "this optimizer reads the gradient of the inputs: pass them, opt.backward(losses, inputs=x_adv), or a "
                "measurement that was taken with inputs."
            )
        leaves = resolve_inputs(self.traced, self.inputs)
        n, views = self.losses.shape[0], self.model.views
        for leaf in leaves:
            if leaf.dim() == 0 or leaf.shape[0] != n * views:
                wanted = f"{n} examples" if views == 1 else f"{n} examples times views={views}"
                raise ValueError(
                    f"inputs must have the {wanted} along their first dimension, got shape {tuple(leaf.shape)}: there "
                    "is one input gradient for each loss."
                )
        return leaves

    def _norms_of_inputs(self, leaves: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...]) -> Tensor:
        packed = pack_input_grads(self.inputs, leaves, gradients)
        if packed is None:
            raise ValueError("inputs must name at least one tensor.")
        return input_norms(packed, self.losses.shape[0]) / self.loss_scale

    def _one_pass(self, *, norms: bool, leaves: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        self._session = Session(self.model, self.traced, self.losses.shape[0], norms=norms, keep=True)
        scales = torch.full_like(self.losses, self.loss_scale)
        return self._session.run(self.losses, scales, leaves, frozen=False, retain_graph=False)

    def has_hooks(self) -> bool:
        """Whether the user hung hooks on parameters, which only autograd's own accumulation runs."""
        parameters = [parameter for _, parameter in self.traced.trained]
        return any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)

    # -- gradient --------------------------------------------------------------------------------------------

    def accumulate(self, weighting: Weighting, divisor: float) -> None:
        """Add ``loss_scale / divisor * sum_i weights_i dL_i/dtheta`` to ``p.grad``; the graph is used up."""
        parts = self._parts(weighting)
        if self._session is None:
            reached = [p for _, p in self.traced.trained if id(p) in self.traced.leaves]
            if not reached:
                raise RuntimeError(
                    "the losses reach no trained parameter of this model: pass the model that computed them."
                )
            parts = [(weights, own) for weights, own in parts if own is None or any(id(p) in own for p in reached)]
            for i, (weights, own) in enumerate(parts):
                targets = [p for p in reached if own is None or id(p) in own]
                seeds = (weights * (self.loss_scale / divisor)).to(self.losses.dtype)
                torch.autograd.backward(self.losses, seeds, inputs=targets, retain_graph=i < len(parts) - 1)
        else:  # its backprops carry the loss scale already
            sums = (
                (parameter, _in_form_of(parameter, gradient))
                for w, own in parts
                for parameter, gradient in self._session.weighted_sums(w / divisor, own)
            )
            if self.ranks is None:
                for parameter, gradient in list(sums):  # nothing is half changed, should one of the sums have failed
                    _add_gradient(parameter, gradient)
            else:
                backpropagate_leaves(chain(self._zeros_of_reached(), sums))
        self.release()

    def _zeros_of_reached(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters in the graph that no gradient arrived at, which ``DistributedDataParallel`` waits for, and 0."""
        arrived = self._session.terms if self._session is not None else {}
        parameters = [parameter for _, parameter in self.traced.trained]
        return [(p, torch.zeros_like(p)) for p in parameters if id(p) in self.traced.leaves and id(p) not in arrived]

    def _parts(self, weighting: Weighting) -> list[tuple[Tensor, set[int] | None]]:
        """Weights ``[n]`` and the parameters (by id) that they are for; None: all."""
        if weighting.groups is None:
            return [(weighting.weights, None)]
        parameters = [parameter for _, parameter in self.traced.trained]
        return [
            (weights, {id(parameters[row]) for row in rows})
            for weights, rows in zip(weighting.weights.unbind(0), weighting.groups, strict=True)
        ]

    def release(self) -> None:
        """Let go of everything that was captured for this batch."""
        for call in self.traced.calls:
            if call.capture.owner is self.model:
                call.release()


def _in_form_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the parameter's type and, unless it is sparse, shape."""
    if gradient.dtype != parameter.dtype:
        gradient = gradient.to(parameter.dtype)
    return gradient if gradient.is_sparse or gradient.shape == parameter.shape else gradient.view_as(parameter)


def _add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Accumulate as autograd does: a gradient stays sparse until a dense one is added."""
    if parameter.grad is None:
        parameter.grad = gradient
    elif parameter.grad.is_sparse and not gradient.is_sparse:
        parameter.grad = gradient + parameter.grad
    else:
        parameter.grad.add_(gradient)
