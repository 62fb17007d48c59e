"""What is run, in what order, and what is chosen on validation images: the protocol as code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from regime import (
    ALPHAS,
    FEWER_SEEDS,
    LRS,
    METHODS,
    SEEDS,
    SETTINGS,
    STEP,
    TUNING_SEED,
)

from engm.recipes.config import RunConfig
from engm.recipes.config_files import from_values
from engm.recipes.reproduce.cells import Cell
from engm.recipes.reproduce.measures import AutoAttack, AutoAttackOfLast
from engm.recipes.reproduce.statistics import Record

Setting = Mapping[str, Any]
Records = Mapping[str, Record]
"""Records by the name of their run."""

CRITERIA = ("last", "best")
RADII = (4, 8, 12)
"""Of the perturbations, in units of 1/255; all else is at 8."""

MAIN = ("msgd", "engm")
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Trial:
    """A run by what tells it from the others.

    Attributes:
        method: an optimizer, or a control: ``mean``, ``permuted`` (of ENGM), ``msgd-scaled``.
        setting: what is not as in :data:`regime.SETTINGS`.
        seed: of weights, order of the images and noise.
        radius: of the perturbation, in units of 1/255.
        autoattack: the images that AutoAttack looks at, if it does.
    """

    method: str
    setting: tuple[tuple[str, Any], ...]
    seed: int
    radius: int = 8
    autoattack: int | None = None

    @property
    def name(self) -> str:
        """The name of its record."""
        settings = "".join(f"-{name.replace('_', '')}{value:.4g}" for name, value in self.setting)
        radius = "" if self.radius == 8 else f"-eps{self.radius}"
        return f"{self.method}{settings}{radius}-seed{self.seed}"

    def config(self, data: Path) -> RunConfig:
        """Settings of the run."""
        values = {**SETTINGS, **dict(self.setting), "data": str(data), "seed": self.seed, "eps": f"{self.radius}/255"}
        values["optimizer"] = self.method
        values["test"] = self.seed != TUNING_SEED
        if self.method in ("mean", "permuted"):
            level = "low" if values.pop("alpha") == min(ALPHAS) else "high"
            values["optimizer"] = f"{HERE / 'controls.py'}:{self.method}_{level}"
        elif self.method == "msgd-scaled":
            values["optimizer"] = "msgd"
        if self.method == "f-engm":
            values.setdefault("alpha", max(ALPHAS))
        return from_values(values, source="the protocol")

    def cell(self, data: Path) -> Cell:
        """What trains it."""
        labels = {"method": self.method, **dict(self.setting), "radius": self.radius, "seed": self.seed}
        attacked = self.autoattack
        measures = () if attacked is None else (AutoAttack(attacked), AutoAttackOfLast(attacked))
        return Cell(self.name, labels, self.config(data), measures)


def setting(**values: Any) -> tuple[tuple[str, Any], ...]:
    """Settings in the order in which names have them."""
    return tuple(values.items())


def tuning(method: str) -> list[Trial]:
    """The grid of a method, as the protocol has it."""
    knob, values = METHODS[method]
    return [Trial(method, setting(lr=lr, **{knob: value}), TUNING_SEED) for value in values for lr in LRS]


def score(record: Record, criterion: str) -> float:
    """Robust accuracy on the validation images, of the last epoch or of the best; 0 of a run that diverged."""
    if "diverged" in record:
        return 0.0
    robust = [row["robust"] for row in record["history"]]
    return float(robust[-1] if criterion == "last" else max(robust))


def chosen(method: str, criterion: str, records: Records) -> Trial:
    """The trial of a method's grid, and of what was added to it, that is best on validation images; ties: the first."""
    return max(
        (trial for trial in grid(method, records) if trial.name in records),
        key=lambda trial: score(records[trial.name], criterion),
    )


def grid(method: str, records: Records) -> list[Trial]:
    """The trials of a method's tuning: where the best learning rate lies at the edge, the next one once as well."""
    trials = tuning(method)
    if any(trial.name not in records for trial in trials):
        return trials
    added = []
    for criterion in CRITERIA:
        best = max(trials, key=lambda trial: score(records[trial.name], criterion))
        values = dict(best.setting)
        beyond = {min(LRS): min(LRS) / STEP, max(LRS): max(LRS) * STEP}.get(values["lr"])
        if beyond is not None:
            added.append(replace(best, setting=setting(**{**values, "lr": float(f"{beyond:.2g}")})))
    return [*trials, *dict.fromkeys(added)]


def finals(method: str, records: Records) -> list[Trial]:
    """The runs that are reported of a method: its choice by either criterion, with every seed."""
    seeds = SEEDS if method in MAIN else FEWER_SEEDS
    return list(
        dict.fromkeys(
            replace(chosen(method, criterion, records), seed=seed, autoattack=_autoattack(method, seed))
            for criterion in CRITERIA
            for seed in seeds
        )
    )


def _autoattack(method: str, seed: int) -> int | None:
    return 500 if method in MAIN and seed in FEWER_SEEDS else None


def mean_weight(records: Records) -> float:
    """ENGM's mean weight over the epochs of the run that it was chosen by."""
    record = records[chosen("engm", "last", records).name]
    return fmean(row["weight_mean"] for row in record["history"])


def controls(records: Records) -> list[Trial]:
    """Steps as long as ENGM's, without its choice of examples: three kinds, by the choice for the last checkpoint."""
    engm = chosen("engm", "last", records)
    lr = float(f"{dict(engm.setting)['lr'] * mean_weight(records):.2g}")
    return [
        *(replace(engm, method=method, seed=seed) for method in ("mean", "permuted") for seed in FEWER_SEEDS),
        *(Trial("msgd-scaled", setting(lr=lr), seed) for seed in FEWER_SEEDS),
    ]


def radii(records: Records) -> list[Trial]:
    """Other radii, with the settings chosen at 8/255 for the last checkpoint."""
    return [
        replace(chosen(method, "last", records), seed=seed, radius=radius)
        for radius in RADII
        if radius != 8
        for method in MAIN
        for seed in FEWER_SEEDS
    ]


DECAY_SWEEP = (5e-5, 5e-4, 5e-3)


def decays(records: Records) -> list[Trial]:
    """Other weight decays, with all else as chosen for the last checkpoint."""
    return [
        Trial(method, with_decay(chosen(method, "last", records), decay), seed)
        for method in MAIN
        for decay in DECAY_SWEEP
        for seed in FEWER_SEEDS
    ]


def with_decay(trial: Trial, decay: float) -> tuple[tuple[str, Any], ...]:
    """A setting with another weight decay; the usual one goes without saying where it is not tuned."""
    values = dict(trial.setting)
    if decay == RunConfig().weight_decay and "weight_decay" not in values:
        return trial.setting
    return setting(**{**values, "weight_decay": decay})


def next_trials(records: Records) -> Sequence[Trial]:
    """What can be run now, in the protocol's order: the first stage that is not complete."""
    for stage in _stages(records):
        missing = [trial for trial in stage if trial.name not in records]
        if missing:
            return missing
    return ()


def _stages(records: Records) -> Any:
    """The stages in order; each is made when those before are complete, because it may depend on them."""
    for method in MAIN:
        yield tuning(method)
        yield grid(method, records)
    for method in MAIN:
        yield finals(method, records)
    yield controls(records)
    for method in METHODS:
        if method not in MAIN:
            yield tuning(method)
            yield grid(method, records)
            yield finals(method, records)
    yield radii(records)
    yield decays(records)
