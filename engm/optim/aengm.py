"""A-ENGM and N-ENGM (paper, Alg. 1): weights from input-gradient norms.

Two misprints of the paper are corrected: Eq. 7 and line 10 of Alg. 1 print max where Eq. 5b and Theorem 1 need min,
and ``||gamma_1 grad_x L + gamma_0||`` where Eq. 6 gives ``gamma_1 ||grad_x L|| + gamma_0``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checks import check_alpha
from ..distributed import means, total
from .base import ExampleOptimizer
from .weights import ExampleNorms, StepStats, Weighting, bound_of, predicted_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LEAST_SPREAD = 16  # of a fit's inputs, relative to their size, in units of the rounding of their type


def fit_line(x: Tensor, y: Tensor, group: ProcessGroup | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares ``y = slope x + intercept`` in float64, through the points of all ranks of a ``group``.

    Two all-reduces, of 3 and of 4 numbers: the means must be known before the centred sums, which do not cancel.

    Returns:
        ``([slope, intercept], R^2, usable)``; not usable if the inputs are all alike or anything is not finite.
    """
    least_spread = LEAST_SPREAD * torch.finfo(x.dtype).eps
    x, y = x.double(), y.double()
    mean_x, mean_y = means(group, x, y)
    dx, dy = x - mean_x, y - mean_y
    sums = dx.square().sum(), (dx * dy).sum(), dy.square().sum(), x.square().sum()
    sxx, sxy, syy, raw_sxx = total(group, *sums)
    slope = sxy / sxx
    coefficients = torch.stack([slope, mean_y - slope * mean_x])
    r_squared = torch.where(syy > 0, sxy.square() / (sxx * syy), torch.ones_like(syy))
    spread = sxx > raw_sxx * least_spread**2  # nearer together than that, they differ by rounding
    return coefficients, r_squared, spread & torch.isfinite(coefficients).all()


def _check_smoothing(tau: int, beta_gamma: float) -> None:
    """Refuses options of the regression that are out of range."""
    if not isinstance(tau, int) or tau < 1:
        raise ValueError(f"tau must be a positive integer, got {tau!r}.")
    if not isinstance(beta_gamma, int | float) or not 0 <= beta_gamma < 1:
        raise ValueError(f"beta_gamma must lie in [0, 1), got {beta_gamma!r}.")


class NENGM(ExampleOptimizer):
    """Naive ENGM: ``w_i = min(alpha / ||dL_i/dx_i||, 1)`` (Alg. 1 with Naive = True).

    ``backward`` needs ``inputs``, or a measurement taken with them.

    Args:
        model: a :class:`engm.GradNormModule`.
        optimizer: any torch optimizer.
        alpha: threshold on the input gradient's norm; the paper's is 0.5 for ResNet-18.

    Raises:
        TypeError: as :class:`ExampleOptimizer`.
        ValueError: ``alpha`` is not positive.
    """

    uses_input_grads = True
    _shown = ("alpha",)
    _hyperparameters = ("alpha",)
    _program_inputs = ("alpha",)

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, alpha: float) -> None:
        self.alpha = check_alpha(alpha)
        super().__init__(model, optimizer)

    def _check_numbers(self) -> None:
        bound_of(self.alpha)

    def weights(self, norms: ExampleNorms) -> Weighting:
        found = norms.of_inputs
        return Weighting(predicted_weights(found, bound_of(self.alpha)), found, found)


class AENGM(ExampleOptimizer):
    """Approximated ENGM: norms predicted as ``gamma_1 ||dL_i/dx_i|| + gamma_0`` (Eq. 6, Alg. 1).

    Every ``tau`` steps the engine's norms of the batch are regressed on the input-gradient norms and the coefficients
    smoothed. ``backward`` needs ``inputs``, or a measurement taken with them. Under ``DistributedDataParallel`` the
    regression is through the examples of all ranks, so that all have the same coefficients.

    Args:
        model: a :class:`engm.GradNormModule`.
        optimizer: any torch optimizer.
        alpha: as for :class:`engm.ENGM`.
        tau: steps between two regressions.
        beta_gamma: share of the old coefficients in the smoothed ones.
        average_first_fit: start from ``gamma = (1, 0)`` and smooth the first fit too, as Alg. 1 prints it, instead of
            taking the first fit whole.

    Raises:
        TypeError: as :class:`ExampleOptimizer`.
        ValueError: an argument is out of range.

    Attributes:
        gamma: ``[2]``, float64: slope and intercept.
        r_squared: of the last fit.
        failed_fits: fits that could not be used (all inputs alike, not finite); the old coefficients stayed. Where
            there were none, the next step regresses again.
        fallbacks: predictions that were not positive, so that the weight was 1; of this rank's own examples.
    """

    uses_norms = True
    uses_input_grads = True
    _shown = ("alpha", "tau", "beta_gamma")
    _hyperparameters = ("alpha", "tau", "beta_gamma")
    _program_inputs = ("alpha",)

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        alpha: float,
        *,
        tau: int = 50,
        beta_gamma: float = 0.7,
        average_first_fit: bool = False,
    ) -> None:
        self.alpha = check_alpha(alpha)
        _check_smoothing(tau, beta_gamma)
        super().__init__(model, optimizer)
        self.tau = tau
        self.beta_gamma = beta_gamma
        self.average_first_fit = average_first_fit
        self.steps = 0
        self.gamma = torch.tensor([1.0, 0.0], dtype=torch.float64)
        self.fits = torch.zeros((), dtype=torch.int64)
        self.r_squared = torch.tensor(torch.nan, dtype=torch.float64)
        self.failed_fits = torch.zeros((), dtype=torch.int64)
        self.fallbacks = torch.zeros((), dtype=torch.int64)
        self._fitted = False  # whether the host knows of a fit that was usable

    @property
    def needs_norms(self) -> bool:
        """Whether this step is one of every ``tau``, at which the regression reads norms."""
        return self.steps % self.tau == 0

    @property
    def estimates_from_all(self) -> bool:
        """Whether the regression is due, through the examples of all ranks."""
        return self.needs_norms

    def _check_numbers(self) -> None:
        bound_of(self.alpha)
        _check_smoothing(self.tau, self.beta_gamma)

    def weights(self, norms: ExampleNorms) -> Weighting:
        found = norms.of_inputs
        again = self.needs_norms and self._fit(found, norms.of_gradients, norms.group)
        self.steps += 0 if again else 1
        gamma = self.gamma = self.gamma.to(found.device)  # loaded from elsewhere: copied once, not every step
        predicted = (gamma[0] * found.double() + gamma[1]).to(found.dtype)
        self.fallbacks = self.fallbacks.to(found.device) + (predicted <= 0).sum()
        return Weighting(predicted_weights(predicted, bound_of(self.alpha)), predicted, found)

    # A regression is in no program.
    _only_of_regressions = ("steps", "tau", "beta_gamma", "average_first_fit", "_fitted")
    not_for_programs = (*ExampleOptimizer.not_for_programs, *_only_of_regressions)

    def eager_reason(self) -> str | None:
        """As the base's: regressions are left out."""
        return "A-ENGM's regression is due" if self.needs_norms else None

    def after_program(self, stats: StepStats) -> StepStats:
        """As the base's."""
        self.steps += 1
        return super().after_program(stats)

    def _fit(self, found: Tensor, norms: Tensor, group: ProcessGroup | None) -> bool:
        """Regress norms on those of input gradients; returns whether the next step has to.

        It has to as long as there are no coefficients of any fit: numbers were not finite, as under a loss scale that
        is still too large, or there was one example. Until the first fit was usable the host waits for the answer.
        """
        fresh, r_squared, usable = fit_line(found, norms, group)
        old = self.gamma.to(fresh)
        smoothed = self.beta_gamma * old + (1 - self.beta_gamma) * fresh
        if not self.average_first_fit:
            smoothed = torch.where(self.fits.to(fresh.device) == 0, fresh, smoothed)
        self.gamma = torch.where(usable, smoothed, old)
        self.r_squared = r_squared
        self.fits = self.fits.to(fresh.device) + usable
        self.failed_fits = self.failed_fits.to(fresh.device) + ~usable
        self._fitted = self._fitted or bool(self.fits)
        return not self._fitted

    def _own_state(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in ("gamma", "fits", "r_squared", "failed_fits", "fallbacks", "steps")}
        return {**super()._own_state(), **own}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        keys = ("gamma", "fits", "r_squared", "failed_fits", "fallbacks")
        tensors = {key: torch.as_tensor(state[key]) for key in keys}
        steps = int(state["steps"])
        super()._load_own_state(state)
        for key, value in tensors.items():
            setattr(self, key, value)
        self.steps, self._fitted = steps, False
