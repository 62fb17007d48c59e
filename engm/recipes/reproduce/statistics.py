"""What a few seeds can say: means with intervals, and paired differences with a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt
from statistics import fmean, stdev
from typing import Any, Literal

Record = dict[str, Any]
Verdict = Literal["agrees", "contradicts", "cannot say"]
Expected = Literal["greater", "less"]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """The mean of a figure over independent runs.

    Attributes:
        value: the mean; NaN of no run.
        half_width: half the width of the 95 % confidence interval (Student's t); NaN of fewer than two runs.
        deviation: standard deviation of single runs; NaN of fewer than two runs.
        n: number of runs.
    """

    value: float
    half_width: float
    deviation: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of values, one a run."""
        n = len(values)
        if n < 2:
            return cls(values[0] if values else nan, nan, nan, n)
        deviation = stdev(values)
        return cls(fmean(values), student(n - 1) * deviation / sqrt(n), deviation, n)

    def text(self, digits: int = 1, scale: float = 1.0) -> str:
        """``mean ± deviation``, or the one value, or a dash."""
        if self.n == 0:
            return "-"
        mean = f"{scale * self.value:.{digits}f}"
        return mean if self.n < 2 else f"{mean} ± {scale * self.deviation:.{digits}f}"


def student(freedom: int) -> float:
    """The two-sided 95 % point of Student's t."""
    from scipy.stats import t  # here: the command line starts faster without

    return float(t.ppf(0.5 + CONFIDENCE / 2, freedom))


@dataclass(frozen=True)
class Finding:
    """A claim of the paper beside what was measured.

    Attributes:
        claim: the claim, in a sentence.
        measured: what was measured, in another.
        verdict: ``"agrees"`` or ``"contradicts"`` where the 95 % interval lies on one side of what the claim says
            (zero, for a paired difference), else ``"cannot say"``.
    """

    claim: str
    measured: str
    verdict: Verdict


def paired_finding(
    claim: str,
    records: Sequence[Record],
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    value: Callable[[Record], float | None],
    *,
    expected: Expected,
    unit: str = "",
    scale: float = 1.0,
    digits: int = 1,
) -> Finding:
    """Whether runs of one kind have more (or less) of something than runs of another with the same seeds.

    Args:
        claim: what the paper says of it.
        records: records of all cells.
        one: labels of the one kind.
        other: labels of the other kind.
        value: reads the figure of a record.
        expected: how the first compares with the second if the claim holds.
        unit: unit of the figure times ``scale``.
        scale: factor by which the figure is multiplied to be shown.
        digits: number of digits behind the point.
    """
    first, second = by_seed(records, one, value), by_seed(records, other, value)
    seeds = sorted(first.keys() & second.keys())
    differences = Mean.of([scale * (first[seed] - second[seed]) for seed in seeds])
    left = Mean.of([scale * first[seed] for seed in seeds])
    right = Mean.of([scale * second[seed] for seed in seeds])
    if not seeds:
        return Finding(claim, "no pair of runs", "cannot say")
    measured = (
        f"{left.value:.{digits}f} against {right.value:.{digits}f}{unit}, difference {differences.value:+.{digits}f}"
    )
    if isnan(differences.half_width):
        return Finding(claim, f"{measured}, one pair of runs", "cannot say")
    measured += f" ± {differences.half_width:.{digits}f} (95 %, {len(seeds)} pairs)"
    # Accuracies are counts: equal differences of a few pairs are no sign of certainty.
    if differences.deviation == 0 or abs(differences.value) <= differences.half_width:
        return Finding(claim, measured, "cannot say")
    agrees = (differences.value > 0) == (expected == "greater")
    return Finding(claim, measured, "agrees" if agrees else "contradicts")


def selected(records: Sequence[Record], labels: Mapping[str, Any]) -> list[Record]:
    """The records with these labels whose run did not diverge."""
    return [r for r in records if labels.items() <= r["labels"].items() and "diverged" not in r]


def by_seed(
    records: Sequence[Record], labels: Mapping[str, Any], value: Callable[[Record], float | None]
) -> dict[int, float]:
    """A figure of each run with these labels, by seed; runs without it are left out."""
    found = {r["labels"]["seed"]: value(r) for r in selected(records, labels)}
    return {seed: float(figure) for seed, figure in found.items() if figure is not None and not isnan(float(figure))}


def mean_of(records: Sequence[Record], labels: Mapping[str, Any], value: Callable[[Record], float | None]) -> Mean:
    """The mean over seeds."""
    return Mean.of(list(by_seed(records, labels, value).values()))


def figure(*path: str) -> Callable[[Record], float | None]:
    """Reads a figure of a record by its place in it; ``None`` where it is not there."""

    def read(record: Record) -> float | None:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return None if value is None else float(value)

    return read
