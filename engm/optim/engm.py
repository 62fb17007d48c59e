"""ENGM (paper, Eq. 5): clip every example's gradient before averaging."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf, sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..backward.inputs import Inputs
from ..backward.norms import Measurement
from ..checks import check_alpha
from ..distributed import gathered
from .base import ExampleOptimizer
from .threshold import RunningQuantile
from .weights import ExampleNorms, Weighting, bound_of, predicted_weights

Weigh = Callable[[Tensor, Tensor], Tensor]
"""``(norms [n], alpha []) -> weights [n]``."""


class ENGM(ExampleOptimizer):
    """Example-normalised gradient descent with momentum, ``w_i = min(alpha / ||dL_i/dtheta||, 1)`` (Eq. 5).

    Exact where nothing couples the examples. In training-mode batch norm the norms are what the model's
    ``batch_norm`` says, and the update is the exact gradient of the reweighted loss through the statistics.

    Args:
        model: a :class:`engm.GradNormModule`.
        optimizer: any torch optimizer; the paper's is SGD with momentum 0.9 and weight decay 5e-4. Weight decay is the
            optimizer's and no part of the norm.
        alpha: the largest norm an example's gradient may have; 5 for ResNet-18, see :func:`engm.alpha_for`. ``"auto"``:
            a running quantile of the norms, see ``clip_fraction``; under ``DistributedDataParallel`` of all ranks'
            norms, gathered at every step, for which the host waits. With ``groups`` also one number a group.
        clip_fraction: with ``alpha="auto"``, the fraction of the examples with a gradient to clip.
        weigh: another weight function, ``(norms [n], alpha []) -> weights [n]``, in place of ``min(alpha / norms, 1)``;
            ``lambda norms, alpha: alpha / (alpha + norms)``, say. It must not wait for the device.
        groups: clip group by group: sequences of parameter names, every trained parameter in one of them, or
            ``"parameter"`` for every tensor by itself. One ``alpha`` is then the bound of the whole gradient, and
            every group's is ``alpha / sqrt(number of groups)``. ``stats.norms`` and ``stats.weights`` are
            ``[groups, n]``. Free where nothing couples the examples, one more backward pass a group where batch norm
            does; not for ``reweight``, whose losses have one weight each.

    Raises:
        TypeError: as :class:`ExampleOptimizer`.
        ValueError: ``alpha`` is not positive, or an option does not fit.
    """

    uses_norms = True
    _shown = ("alpha",)
    _hyperparameters = ("alpha",)
    _program_inputs = ("alpha",)

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        alpha: float | Sequence[float] | Literal["auto"],
        *,
        clip_fraction: float = 0.5,
        weigh: Weigh | None = None,
        groups: Sequence[Sequence[str]] | Literal["parameter"] | None = None,
    ) -> None:
        super().__init__(model, optimizer)
        if weigh is not None and not callable(weigh):
            raise TypeError(f"weigh must be a function of (norms, alpha), got {type(weigh).__name__}.")
        self.weigh = weigh
        self.groups = None if groups is None else self._rows_of(groups)
        self._grouped = tuple(name for name, _ in self.model.trainable_parameters())
        self._rows: list[Tensor] = []
        self.clip_fraction = RunningQuantile(clip_fraction).fraction
        self.quantile: RunningQuantile | None = None
        self.alpha = alpha
        self._alphas()

    def __setattr__(self, name: str, value: Any) -> None:
        """As of any object; ``"auto"`` for ``alpha`` begins to follow the norms, anything else ends that."""
        if name == "alpha":
            follows = isinstance(value, str) and value == "auto" and self.groups is None
            if follows != (self.quantile is not None):
                self.quantile = RunningQuantile(self.clip_fraction) if follows else None
        super().__setattr__(name, value)

    def _rows_of(self, groups: Sequence[Sequence[str]] | str) -> list[list[int]]:
        names = [name for name, _ in self.model.trainable_parameters()]
        if isinstance(groups, str):
            if groups != "parameter":
                raise ValueError(f"groups must be 'parameter' or sequences of parameter names, got {groups!r}.")
            return [[row] for row in range(len(names))]
        given = [name for group in groups for name in group]
        odd = sorted({n for n in given if given.count(n) > 1} | (set(given) ^ set(names)))
        if odd or any(not group for group in groups):
            look = odd[:5] or "the empty one"
            raise ValueError(f"groups must name every trained parameter once, with no empty group; look at {look}.")
        return [[names.index(name) for name in group] for group in groups]

    def _rows_on(self, device: torch.device) -> list[Tensor]:
        """The groups as index tensors, copied to the device once."""
        if not self._rows or self._rows[0].device != device:
            self._rows = [torch.tensor(rows, device=device) for rows in self.groups or ()]
        return self._rows

    def _alphas(self) -> list[float | Tensor]:
        """The bound of every group (of the one there is without groups)."""
        if self.quantile is not None:
            return [inf]
        if isinstance(self.alpha, str):
            raise ValueError(f"alpha must be a positive number or 'auto' (without groups), got {self.alpha!r}.")
        if not isinstance(self.alpha, float | str | Tensor) and isinstance(self.alpha, Sequence):
            if self.groups is None or len(self.alpha) != len(self.groups):
                wanted = "only with groups" if self.groups is None else f"one for each of the {len(self.groups)} groups"
                raise ValueError(f"several alphas are taken {wanted}, got {self.alpha!r}.")
            return [check_alpha(alpha) for alpha in self.alpha]
        alpha = bound_of(self.alpha)
        return [alpha] if self.groups is None else [alpha / sqrt(len(self.groups))] * len(self.groups)

    def reweight(
        self,
        losses: Tensor,
        inputs: Inputs = None,
        *,
        measurement: Measurement | None = None,
        loss_scale: float = 1.0,
        check: bool | None = None,
    ) -> Tensor:
        if self.groups is not None:
            raise ValueError("reweight gives every loss one weight: clipping by groups needs opt.backward(losses).")
        return super().reweight(losses, inputs, measurement=measurement, loss_scale=loss_scale, check=check)

    @property
    def estimates_from_all(self) -> bool:
        """Whether ``alpha`` follows the norms of all ranks."""
        return self.quantile is not None

    def _check_numbers(self) -> None:
        self._alphas()

    def _check_options(self) -> None:
        super()._check_options()
        if self.groups is None:
            return
        if tuple(name for name, _ in self.model.trainable_parameters()) != self._grouped:
            raise RuntimeError(
                "groups were made for other trained parameters than the model has now: make a new ENGM after "
                "parameters were frozen, unfrozen, added or removed."
            )

    def weights(self, norms: ExampleNorms) -> Weighting:
        alphas = self._alphas()
        if self.groups is not None:
            rows = self._rows_on(norms.losses.device)
            pairs = [norms.clipped(alpha, own) for own, alpha in zip(rows, alphas, strict=True)]
            each = [self._weigh(found, alpha, own) for (found, own), alpha in zip(pairs, alphas, strict=True)]
            return Weighting(torch.stack(each), torch.stack([found for found, _ in pairs]), groups=self.groups)
        found, weights = norms.clipped(alphas[0])
        if self.quantile is None:
            return Weighting(self._weigh(found, alphas[0], weights), found)
        following = self.quantile.following(gathered(norms.group, found))
        weights = self._weigh(found, following, predicted_weights(found, following))
        self.quantile.value = following
        return Weighting(weights, found)

    def _weigh(self, norms: Tensor, alpha: float | Tensor, clipped: Tensor) -> Tensor:
        """The user's weights, or the ones there are."""
        if self.weigh is None:
            return clipped
        weights = self.weigh(norms, torch.as_tensor(alpha, dtype=norms.dtype))
        if not isinstance(weights, Tensor) or weights.shape != norms.shape:
            got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"weigh must return one weight for each of the {len(norms)} norms, got {got}.")
        return torch.where(norms.isfinite(), weights.detach(), torch.nan)  # never a silent 0

    def numbers(self) -> dict[str, float]:
        """As the base's: alpha, unless there are several, it follows the norms, or the user's ``weigh`` is given it."""
        if self.weigh is None and self.quantile is None and not isinstance(self.alpha, Sequence):
            return super().numbers()
        self._check_options()
        return {}

    def carried(self) -> dict[str, Tensor]:
        """As the base's, and the running quantile."""
        value = None if self.quantile is None else self.quantile.value
        return super().carried() if value is None else {**super().carried(), "quantile": value}

    def carry(self, tensors: Mapping[str, Tensor]) -> None:
        """As the base's."""
        own = dict(tensors)
        value = own.pop("quantile", None)
        super().carry(own)
        if self.quantile is not None:
            self.quantile.value = value

    def eager_reason(self) -> str | None:
        """As the base's: the first quantile is the batch's own, those that follow are averages."""
        first = self.quantile is not None and self.quantile.value is None
        return "alpha='auto' takes its first quantile" if first else None

    def _own_state(self) -> dict[str, Any]:
        state = super()._own_state()
        return state if self.quantile is None else {**state, "quantile": self.quantile.value}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        alpha = state["hyperparameters"]["alpha"]
        if (alpha == "auto") != (self.quantile is not None):
            raise ValueError(
                f"this state_dict has alpha={alpha!r}, this optimizer {self.alpha!r}: make it alike first."
            )
        value = None if self.quantile is None else state["quantile"]
        super()._load_own_state(state)
        if self.quantile is not None:
            self.quantile.value = value
