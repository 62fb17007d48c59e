"""What a method of weighting gets and gives: norms of a batch's examples in, their weights and a step's figures out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .. import ops
from ..build import distrusted
from ..checks import check_alpha
from ..distributed import Ranks
from ..torch_internals import is_recorded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


Source = Literal["own", "borrowed"]
"""Where a step's norms came from: a pass of its own, or the measurement that it was handed."""


@dataclass(frozen=True)
class ExampleNorms:
    """The norms of one batch's examples, as far as the optimizer asked for them.

    Attributes:
        losses: ``[n]``, detached.
        squared: ``[L, n]``, squared norms of the gradients by parameter tensor; None unless ``needs_norms``.
        factors: ``[L]``, calibration factors of the squared norms; None where they hold as they are.
        input_norms: ``[n]``, norms of the input gradients; None unless ``needs_input_grads``.
        ranks: the processes whose batches make up one batch with this one; None for a lone process.
    """

    losses: Tensor
    squared: Tensor | None = None
    factors: Tensor | None = None
    input_norms: Tensor | None = None
    ranks: Ranks | None = None

    @property
    def of_gradients(self) -> Tensor:
        """``[n]``, norms of the gradients over all parameters.

        Raises:
            RuntimeError: the optimizer did not ask for them.
        """
        return self.clipped(inf)[0]

    @property
    def of_inputs(self) -> Tensor:
        """``[n]``, norms of the input gradients.

        Raises:
            RuntimeError: the optimizer did not ask for them.
        """
        if self.input_norms is None:
            raise RuntimeError("this optimizer did not ask for input gradients: set uses_input_grads in its class.")
        return self.input_norms

    @property
    def group(self) -> ProcessGroup | None:
        """The process group to estimate something from the examples of all ranks; None for a lone process.

        Raises:
            RuntimeError: inside ``join()``, where not all ranks would answer.
        """
        return None if self.ranks is None else self.ranks.estimating_group()

    def clipped(self, alpha: float | Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Norms ``[n]`` of the gradients and ``min(alpha / norm, 1)``, ``[n]``, in one kernel where alpha is a number.

        Args:
            alpha: the bound; 0-dimensional, in float64, where it is an input of a program. The bits are the same.
            rows: indices of the parameter tensors that the norms are taken over; default all.

        Raises:
            RuntimeError: the optimizer did not ask for norms.
        """
        if self.squared is None:
            raise RuntimeError("this optimizer did not ask for gradient norms: set uses_norms in its class.")
        squared, factors = self.squared, self.factors
        if rows is not None:
            squared, factors = squared[rows], None if factors is None else factors[rows]
        if not isinstance(alpha, Tensor):
            return ops.clip_weights(squared, alpha, factors)
        # In float64 the kernel returns the very norms that it divides by; ones are NaN where a sum is not finite.
        norms, ones = ops.clip_weights(squared.double(), inf, factors)
        weights = torch.where(norms <= alpha, ones, ones * (alpha / norms))
        dtype = torch.promote_types(squared.dtype, torch.float32)
        return norms.to(dtype), weights.to(dtype)


@dataclass(frozen=True)
class Weighting:
    """What an optimizer decided for one batch.

    Attributes:
        weights: ``[n]``; ``[groups, n]`` with ``groups``.
        norms: of the same shape, what the weights were made from; None where they were made from nothing.
        input_norms: ``[n]``, norms of the input gradients, where they were used.
        groups: for each group the rows of its parameters, in the order of the model's trained parameters.
    """

    weights: Tensor
    norms: Tensor | None = None
    input_norms: Tensor | None = None
    groups: Sequence[Sequence[int]] | None = None


def checked_weighting(found: Any, n: int, method: str) -> Weighting:
    """What ``weights`` of an optimizer returned, if it is one weight an example, detached.

    Args:
        found: what it returned.
        n: number of examples.
        method: the name of the optimizer's class.

    Raises:
        TypeError: it is no weighting.
        ValueError: there are too few weights or too many.
    """
    if not isinstance(found, Weighting) or not isinstance(found.weights, Tensor):
        raise TypeError(
            f"{method}.weights must return an engm.optim.Weighting of a tensor, got {type(found).__name__}."
        )
    wanted = (n,) if found.groups is None else (len(found.groups), n)
    if tuple(found.weights.shape) != wanted:
        raise ValueError(f"{method}.weights must return weights {list(wanted)}, got {list(found.weights.shape)}.")
    return replace(found, weights=found.weights.detach()) if found.weights.requires_grad else found


@dataclass(frozen=True)
class StepStats:
    """Figures of one ``backward`` or ``reweight``, as tensors on the losses' device (reading them synchronises).

    Attributes:
        losses: ``[n]``, the losses, detached.
        weights: ``[n]``, ``w_i``.
        norms: ``[n]``, the norms the weights were made from (a prediction for N- and A-ENGM); None for MSGD.
        input_norms: ``[n]``, norms of the input gradients, where they were used.
        source: where the norms came from: ``"own"``, a pass of the step's own, or ``"borrowed"``, the measurement that
            the step was handed. A measurement is not used where batch norm couples the examples and its weights were
            judged to be more than 8 % off when factors were last taken. None where no norms were read.

    Weights and norms are ``[groups, n]`` where :class:`engm.ENGM` clips by groups.
    """

    losses: Tensor
    weights: Tensor
    norms: Tensor | None = None
    input_norms: Tensor | None = None
    source: Source | None = None

    def __str__(self) -> str:
        """One line, for a training loop to print; waits for the device."""
        norms = "" if self.norms is None else f", median norm {float(self.norms.median()):.4g} ({self.source})"
        return (
            f"{len(self.losses)} examples: mean loss {float(self.losses.mean()):.4g}, mean weight "
            f"{float(self.weights.mean()):.4g}, {float(self.clipped_fraction):.0%} clipped{norms}"
        )

    @property
    def through_torch(self) -> tuple[str, ...]:
        """The kernels that failed their trials on this device (:func:`engm.self_test`), replaced by torch."""
        return distrusted(self.losses.device)

    @property
    def clipped_fraction(self) -> Tensor:
        """Share of the weights below 1, 0-dimensional."""
        return (self.weights < 1).to(self.weights.dtype).mean()


def bound_of(alpha: Any, check: Callable[[Any], float] = check_alpha) -> float | Tensor:
    """``alpha`` as a number, checked, or the tensor that stands for it while a step is traced.

    Raises:
        ValueError: ``alpha`` is out of range.
    """
    return alpha if isinstance(alpha, Tensor) and is_recorded() else check(alpha)


def quotients(alpha: float | Tensor, norms: Tensor) -> Tensor:
    """``alpha / norms`` by way of the reciprocal, as torch divides a number; a 0-dimensional tensor gives the same."""
    return norms.reciprocal() * alpha


def predicted_weights(predicted: Tensor, alpha: float | Tensor) -> Tensor:
    """``min(alpha / predicted, 1)``; 1 where the prediction is not positive, NaN where it is not finite."""
    weights = quotients(alpha, predicted).clamp(max=1)
    weights = torch.where(predicted > 0, weights, torch.ones_like(weights))
    return torch.where(torch.isfinite(predicted), weights, torch.full_like(weights, torch.nan))
