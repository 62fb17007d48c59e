"""The figures of training steps: kept on their device as they come, looked at many steps at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import nan
from typing import Any

import torch
from torch import Tensor

from engm.optim import StepStats

_OF_A_STEP = ("weights", "norms", "input_norms")
QUANTILES = {"min": 0.0, "q10": 0.1, "median": 0.5, "q90": 0.9, "max": 1.0}


@dataclass(frozen=True)
class Examples:
    """Per-example figures of one step or of many, on the CPU in float64.

    Steps that a loss scaler skipped have losses and no other figures.

    Attributes:
        losses: one number an example.
        weights: one an example (one a group and example, where clipping is by group).
        norms: as the weights; ``None`` for methods without.
        input_norms: one an example; ``None`` for methods that do not read them.
        gradient_norms: one a step: of the mean gradient, for methods that scale it as a whole.
        borrowed: one a step: 1 where the norms were the attack's, 0 where the step took its own; ``None`` for methods
            that read none.
    """

    losses: Tensor
    weights: Tensor
    norms: Tensor | None = None
    input_norms: Tensor | None = None
    gradient_norms: Tensor | None = None
    borrowed: Tensor | None = None

    def summary(self) -> dict[str, float]:
        """Means, quantiles and the clipped fraction, by the names that logs use."""
        found = {"loss": _mean(self.losses), "weight_mean": _mean(self.weights)}
        found["clipped"] = _mean((self.weights < 1).double())
        found.update(_quantiles("weight", self.weights))
        for name, values in (("norm", self.norms), ("input_norm", self.input_norms)):
            if values is not None:
                found[f"{name}_mean"] = _mean(values)
                found.update(_quantiles(name, values))
        if self.gradient_norms is not None:
            found["gradient_norm"] = _mean(self.gradient_norms)
        if self.borrowed is not None:
            found["borrowed"] = _mean(self.borrowed)
        return found


@dataclass
class StepFigures:
    """Collects the statistics of steps without waiting for the device; :meth:`take` is where it is waited for."""

    _kept: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, stats: StepStats, gradient_norm: Tensor | None = None) -> None:
        """Keeps one step's statistics, where they are."""
        named = {
            "losses": stats.losses,
            "weights": stats.weights,
            "norms": stats.norms,
            "input_norms": stats.input_norms,
            "gradient_norms": gradient_norm,
            "borrowed": None if stats.source is None else stats.losses.new_tensor(float(stats.source == "borrowed")),
        }
        for name, values in named.items():
            if values is not None:
                self._kept.setdefault(name, []).append(values.detach().reshape(-1))

    def take(self) -> list[Examples]:
        """The figures of every step since the last call, in one copy from the device for each kind.

        Raises:
            ValueError: some of the steps had a kind of figure that others had not.
        """
        kept, self._kept = self._kept, {}
        steps = {name: _to_host(parts) for name, parts in kept.items()}
        if len({len(parts) for parts in steps.values()}) > 1:
            raise ValueError("steps of different optimizers cannot be collected together")
        return [Examples(**dict(zip(steps, parts, strict=True))) for parts in zip(*steps.values(), strict=True)]


def joined(parts: Sequence[StepStats]) -> StepStats:
    """The statistics of a batch that was taken in parts."""
    if len(parts) == 1:
        return parts[0]
    names = [f.name for f in fields(StepStats) if isinstance(getattr(parts[0], f.name), Tensor)]
    values: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts], -1) for name in names}
    return replace(parts[0], **values)


def skipped(stats: StepStats) -> StepStats:
    """The statistics of a step that was not taken: the losses, and nothing of weights and norms, which overflowed."""
    none: dict[str, Any] = {
        name: None if (value := getattr(stats, name)) is None else value[..., :0] for name in _OF_A_STEP
    }
    return replace(stats, **none)


def pack(steps: Sequence[Examples]) -> dict[str, Any]:
    """The same figures as a few long tensors and the steps' lengths: what a checkpoint keeps of an unfinished epoch."""
    if not steps:
        return {}
    joined = together(steps)
    names = [name for name in Examples.__dataclass_fields__ if getattr(joined, name) is not None]
    lengths = {name: [len(getattr(step, name)) for step in steps] for name in names}
    return {"values": {name: getattr(joined, name) for name in names}, "lengths": lengths}


def unpack(packed: Mapping[str, Any]) -> list[Examples]:
    """The inverse of :func:`pack`."""
    if not packed:
        return []
    parts = {name: values.split(packed["lengths"][name]) for name, values in packed["values"].items()}
    return [Examples(**dict(zip(parts, step, strict=True))) for step in zip(*parts.values(), strict=True)]


def together(steps: Sequence[Examples]) -> Examples:
    """All examples of several steps."""
    names = [name for name in Examples.__dataclass_fields__ if getattr(steps[0], name) is not None]
    return Examples(**{name: torch.cat([getattr(step, name) for step in steps]) for name in names})


def _to_host(parts: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.cat(parts).cpu().double().split([len(part) for part in parts])


def _mean(values: Tensor) -> float:
    return values.mean().item()


def _quantiles(name: str, values: Tensor) -> dict[str, float]:
    """Nearest ranks; a NaN counts as larger than everything, and so is all that is known of nothing."""
    ranked = values.sort().values if len(values) else torch.full((1,), nan)
    return {f"{name}_{key}": ranked[round(q * (len(ranked) - 1))].item() for key, q in QUANTILES.items()}
