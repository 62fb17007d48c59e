"""What ENGM is compared with (Table 1 of the paper): MSGD, global norm clipping, SNGM and Fixed ENGM."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_positive
from ..ops import accumulation_dtype
from .base import ExampleOptimizer, total_norm
from .closure import refuse_missing_closure
from .weights import ExampleNorms, Weighting, bound_of, quotients


class MSGD(ExampleOptimizer):
    """The plain optimizer behind the same face: every weight is 1 (with SGD and momentum: the paper's Eq. 3).

    ``backward(losses)`` does what ``losses.mean().backward()`` does, at that cost; norms are not computed.

    Args:
        model: a :class:`engm.GradNormModule`.
        optimizer: any torch optimizer.

    Raises:
        TypeError: as :class:`ExampleOptimizer`.
    """

    def weights(self, norms: ExampleNorms) -> Weighting:
        return Weighting(torch.ones_like(norms.losses))


class WholeGradientOptimizer(MSGD):
    """Weights of 1, and a factor on the whole gradient when ``step`` is called.

    The factor is of what lies in ``p.grad`` then: of all micro-batches together, of the reduced gradient under
    ``DistributedDataParallel``, of the unscaled one under a gradient scaler. Gradients are changed in place.

    Attributes:
        grad_norm: norm of the gradient at the last step, before the factor; a tensor (reading it synchronises).
    """

    grad_norm: Tensor | None = None

    def _factor(self, norm: Tensor) -> Tensor:
        """The factor for a gradient of this norm; both 0-dimensional."""
        raise TypeError(f"{type(self).__name__} must define _factor")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Multiply the gradient by its factor, then take the inner optimizer's step.

        Args:
            closure: as in :meth:`ExampleOptimizer.step`; the gradient of every evaluation gets its factor.

        Raises:
            TypeError, RuntimeError: as :meth:`ExampleOptimizer.step`.
        """
        if closure is None:
            refuse_missing_closure(self.optimizer)
            self._multiply()
        return super().step(closure)

    def _evaluated(self, closure: Callable[[], Any]) -> Any:
        loss = super()._evaluated(closure)
        self._multiply()
        return loss

    @torch.no_grad()
    def _multiply(self) -> None:
        """Multiply the gradient that there is by its factor."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            self.grad_norm = total_norm(gradients)
            # A norm that overflows would make a silent 0 of numbers that do not.
            factor = torch.where(self.grad_norm.isfinite(), self._factor(self.grad_norm), torch.nan)
            for gradient in gradients:
                wide = accumulation_dtype(gradient)  # into which the factor fits if it does not into 16 bits
                if wide == gradient.dtype:
                    gradient.mul_(factor.to(gradient))
                else:
                    gradient.copy_(gradient.to(wide) * factor.to(gradient.device, wide))


class SNGM(WholeGradientOptimizer):
    """Stochastic normalised gradient descent with momentum: ``v <- beta v + g / ||g||`` (Eq. 4), g the mean gradient.

    Only its direction counts, so learning rates are other ones than SGD's. A gradient of 0 stays 0.

    Args:
        model: a :class:`engm.GradNormModule`.
        optimizer: any torch optimizer; the paper's is SGD with momentum.

    Raises:
        TypeError: as :class:`ExampleOptimizer`.
    """

    def _factor(self, norm: Tensor) -> Tensor:
        return torch.where(norm == 0, torch.ones_like(norm), 1 / norm)


class GNC(WholeGradientOptimizer):
    """Global norm clipping: the mean gradient times ``min(max_norm / ||g||, 1)``; with SGD the paper's MGNC.

    What ``torch.nn.utils.clip_grad_norm_`` does between ``backward`` and ``step``.

    Args:
        model: a :class:`engm.GradNormModule`.
        optimizer: any torch optimizer.
        max_norm: the largest norm of the mean gradient; 25 in the paper.

    Raises:
        TypeError: as :class:`ExampleOptimizer`.
        ValueError: ``max_norm`` is not positive.
    """

    _shown = ("max_norm",)
    _hyperparameters = ("max_norm",)

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float = 25.0) -> None:
        self.max_norm = check_positive("max_norm", max_norm)
        super().__init__(model, optimizer)

    not_for_programs = (*WholeGradientOptimizer.not_for_programs, "max_norm")  # which step reads, not backward

    def _check_numbers(self) -> None:
        check_positive("max_norm", self.max_norm)

    def _factor(self, norm: Tensor) -> Tensor:
        self._check_options()  # a negative one, set since, would turn the gradient round
        return torch.where(norm > self.max_norm, self.max_norm / norm, torch.ones_like(norm))


class FENGM(ExampleOptimizer):
    """Fixed ENGM: every example's gradient is scaled *to* the norm ``alpha``, ``w_i = alpha / ||dL_i/dtheta||``.

    Short gradients are lengthened, which is what costs it its robustness in the paper's Table 2. The text of the paper
    normalises to ``alpha``, its formula to 1; the default is the formula. A gradient of 0 has weight 1.

    Args:
        model: a :class:`engm.GradNormModule`.
        optimizer: any torch optimizer.
        alpha: the norm that every example's gradient gets.

    Raises:
        TypeError: as :class:`ExampleOptimizer`.
        ValueError: ``alpha`` is not a positive finite number.
    """

    uses_norms = True
    _shown = ("alpha",)
    _hyperparameters = ("alpha",)
    _program_inputs = ("alpha",)

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, alpha: float = 1.0) -> None:
        self.alpha = check_positive("alpha", alpha)
        super().__init__(model, optimizer)

    def _bound(self) -> float | Tensor:
        """The norm that every gradient gets; a tensor while a step is traced."""
        return bound_of(self.alpha, partial(check_positive, "alpha"))

    def _check_numbers(self) -> None:
        self._bound()

    def weights(self, norms: ExampleNorms) -> Weighting:
        found = norms.of_gradients
        weights = torch.where(found > 0, quotients(self._bound(), found), torch.ones_like(found))
        return Weighting(torch.where(found.isfinite(), weights, torch.full_like(found, torch.nan)), found)
