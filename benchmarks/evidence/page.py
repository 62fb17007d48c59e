"""Writes docs/results/evidence.md and its picture from the records: tables, verdicts by the protocol's rule, cost.

python benchmarks/evidence/page.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

from plan import (
    CRITERIA,
    DECAY_SWEEP,
    MAIN,
    RADII,
    Records,
    Trial,
    chosen,
    controls,
    decays,
    grid,
    next_trials,
    radii,
    with_decay,
)
from regime import FEWER_SEEDS, METHODS, SEEDS
from run import read_records

from engm.recipes.methods import label_of
from engm.recipes.pictures import legend_below, mark_decays, mean_curve, picture, style_of
from engm.recipes.reproduce.published import TABLE2
from engm.recipes.reproduce.statistics import Mean, Record, figure
from engm.recipes.storage.atomic_files import write_text_atomic

DOCS = Path(__file__).resolve().parents[2] / "docs" / "results"
WORTH = 1.0
"""The gain, in points of robust accuracy, that a user would change optimizers for."""

Read = Callable[[Record], float | None]
BEST, LAST = figure("test", "best", "robust"), figure("test", "last", "robust")
NATURAL, OVERFIT = figure("test", "best", "natural"), figure("overfit")
AA_BEST, AA_LAST = figure("measures", "autoattack"), figure("measures", "autoattack_last")
UNBOUNDED = ("f-engm",)  # methods that divide by the norm alone
LABELS = {"mean": "ENGM, mean weight for all", "permuted": "ENGM, weights permuted", "msgd-scaled": "MSGD, lr × w"}


def name_of(method: str) -> str:
    """What the tables call a method or a control."""
    return LABELS.get(method) or label_of(method)


@dataclass(frozen=True)
class Comparison:
    """A question that is answered by runs with the same seeds.

    Attributes:
        question: in a sentence.
        one: the runs that should have more of it.
        other: those that should have less.
        read: the figure, of a record.
        worth: the difference, in points, below which a gain is none.
        unless_worse: another figure, which must not be lower for a yes.
    """

    question: str
    one: Sequence[Trial]
    other: Sequence[Trial]
    read: Read
    worth: float = WORTH
    unless_worse: Read | None = None

    def differences(self, records: Records) -> list[float]:
        """Of every pair of finished runs, in points."""
        found = []
        others = {trial.seed: trial for trial in self.other}
        for trial in self.one:
            pair = [records.get(t.name) for t in (trial, others.get(trial.seed)) if t is not None]
            values = [None if record is None or "diverged" in record else self.read(record) for record in pair]
            if len(values) == 2 and values[0] is not None and values[1] is not None:
                found.append(100 * (values[0] - values[1]))
        return found

    def row(self, records: Records) -> str:
        """A row of the table of verdicts."""
        mean = Mean.of(self.differences(records))
        said = verdict(mean, self.worth)
        if self.unless_worse is not None and said.startswith("yes"):
            # Of overfitting the runs come the other way round: less of it is the gain.
            beside = replace(self, one=self.other, other=self.one, read=self.unless_worse, unless_worse=None)
            if Mean.of(beside.differences(records)).value < 0:
                said = "cannot tell: the last checkpoint is worse"
        shown = (
            "-"
            if not mean.n
            else f"{mean.value:+.1f}" + ("" if isnan(mean.half_width) else f" ± {mean.half_width:.1f}")
        )
        return f"| {self.question} | {shown} | {mean.n} | **{said}** |"


def verdict(difference: Mean, worth: float) -> str:
    """The protocol's rule, of differences in points that a gain makes positive."""
    if difference.n < 2 or isnan(difference.half_width) or difference.deviation == 0:
        return "not run" if not difference.n else "cannot tell"
    low, high = difference.value - difference.half_width, difference.value + difference.half_width
    if low > 0:
        return "yes" if high > worth else f"yes, by less than {worth:g}"
    if high < worth:
        return "no, it is worse" if high < 0 else "no"
    return "cannot tell"


def _mean(records: Records, trials: Sequence[Trial], read: Read, scale: float = 100.0, digits: int = 1) -> str:
    values = [read(records[t.name]) for t in trials if t.name in records and "diverged" not in records[t.name]]
    return Mean.of([value for value in values if value is not None]).text(digits, scale)


def weight_of(record: Record) -> float:
    """The mean weight over all epochs."""
    return fmean(row.get("weight_mean", 1.0) for row in record["history"])


def weight_text(method: str, weight: float) -> str:
    """A mean weight in the page; nothing of a method whose weights have no bound, so that their mean says nothing."""
    return "-" if method in UNBOUNDED else f"{weight:.2f}"


def _row(records: Records, label: str, trials: Sequence[Trial], published: Any = None) -> str:
    there = [records[t.name] for t in trials if t.name in records and "diverged" not in records[t.name]]
    if not there:
        return f"| {label} | - | - | - | not run | | | | | 0 |"
    values = dict(trials[0].setting)
    weight = fmean(weight_of(record) for record in there)
    other = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in values.items() if name != "lr")
    cells = [
        label,
        f"lr {values['lr']:g}{', ' if other else ''}{other}",
        weight_text(trials[0].method, weight),
        "-" if trials[0].method in UNBOUNDED else f"{values['lr'] * weight:.3g}",
        *(_mean(records, trials, read) for read in (NATURAL, BEST, LAST, OVERFIT)),
        f"{_mean(records, trials, AA_BEST)} / {_mean(records, trials, AA_LAST)}",
        str(len(there)),
    ]
    if published is not None:
        for index, value in ((4, published.natural), (5, published.best), (6, published.last), (7, published.overfit)):
            cells[index] += f" [{value:g}]"
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| | setting | mean w | lr × w | Natural | Best | Last | Overfit | AA, best / last | runs |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def _tuned(records: Records) -> list[str]:
    """The methods whose tuning is complete."""
    return [m for m in METHODS if all(trial.name in records for trial in grid(m, records))]


def _by(method: str, criterion: str, records: Records) -> list[Trial]:
    best = chosen(method, criterion, records)
    return [replace(best, seed=seed) for seed in (SEEDS if method in MAIN else FEWER_SEEDS)]


def page(records: Records) -> str:
    """The page, in Markdown."""
    tuned = _tuned(records)
    lines = [INTRODUCTION, *_progress(records)]
    if set(MAIN) <= set(tuned):
        lines += ["## Verdicts", "", VERDICTS, "", "| question | difference | pairs | verdict |", "|---|---:|---:|---|"]
        lines += [comparison.row(records) for comparison in comparisons(records, tuned)]
    lines += ["", "## Best, last and robust overfitting", "", ACCURACIES, ""]
    if tuned:
        lines += ["![robust accuracy on validation images over the epochs](evidence.svg)", ""]
    for criterion in CRITERIA:
        lines += [f"Settings chosen by the {criterion} checkpoint on validation images:", "", HEADER]
        lines += [_row(records, name_of(m), _by(m, criterion, records), TABLE2.get(m)) for m in tuned]
        lines.append("")
    if set(MAIN) <= set(tuned):
        lines += _others(records)
    lines += _tuning(records) + _cost(records)
    return "\n".join(lines).rstrip() + "\n"


def _progress(records: Records) -> list[str]:
    missing = next_trials(records)
    if not missing:
        return ["Everything that the protocol asks for has been run.", ""]
    return [
        f"**Not complete:** {len(records)} runs are done; next are {missing[0].name} and, of the same stage, "
        f"{len(missing) - 1} more. What is missing is shown as not run, and no verdict is given of it.",
        "",
    ]


def comparisons(records: Records, tuned: Sequence[str]) -> list[Comparison]:
    """What the protocol compares, in its order."""
    by_last = {method: _by(method, "last", records) for method in tuned}
    by_best = {method: _by(method, "best", records) for method in tuned}
    found = []
    for method in tuned:
        if method != "msgd":
            label, pair = name_of(method), (by_last[method], by_last["msgd"])
            found.append(Comparison(f"{label}: last checkpoint more robust than MSGD's", *pair, LAST))
            best = (by_best[method], by_best["msgd"])
            found.append(Comparison(f"{label}: best checkpoint more robust than MSGD's", *best, BEST))
            overfit = (pair[1], pair[0])
            found.append(
                Comparison(f"{label}: overfits less than MSGD (share of the best)", *overfit, OVERFIT, 5.0, LAST)
            )
    for read, which in ((AA_BEST, "best"), (AA_LAST, "last")):
        pair = by_best if which == "best" else by_last
        question = f"ENGM: {which} checkpoint more robust than MSGD's under AutoAttack"
        found.append(Comparison(question, pair["engm"][:3], pair["msgd"][:3], read))
    for method in ("mean", "permuted", "msgd-scaled"):
        of = [trial for trial in controls(records) if trial.method == method]
        question = f"ENGM: last checkpoint more robust than that of {name_of(method)}"
        found.append(Comparison(question, by_last["engm"][: len(of)], of, LAST))
    return found


def _others(records: Records) -> list[str]:
    """Controls, radii and weight decays."""
    lines = ["## Controls", "", CONTROLS, "", HEADER]
    for method in ("engm", "msgd"):
        lines.append(_row(records, name_of(method), _by(method, "last", records)[:3]))
    for method in ("mean", "permuted", "msgd-scaled"):
        lines.append(_row(records, name_of(method), [t for t in controls(records) if t.method == method]))
    lines += [
        "",
        "## Radii",
        "",
        "Does the gain grow with ε? Settings as chosen at 8/255 by the last checkpoint.",
        "",
        HEADER,
    ]
    swept = radii(records)
    for radius in RADII:
        for method in MAIN:
            of = [t for t in swept if t.method == method and t.radius == radius]
            of = of or _by(method, "last", records)[:3]
            lines.append(_row(records, f"{name_of(method)}, ε {radius}/255", of))
    lines += [
        "",
        "## Weight decay",
        "",
        "Is ENGM less sensitive to it? All else as chosen by the last checkpoint.",
        "",
        HEADER,
    ]
    for method in MAIN:
        for decay in DECAY_SWEEP:
            wanted = with_decay(chosen(method, "last", records), decay)
            of = [t for t in decays(records) if t.method == method and t.setting == wanted]
            lines.append(_row(records, f"{name_of(method)}, decay {decay:g}", of))
    return [*lines, ""]


def _tuning(records: Records) -> list[str]:
    lines = ["## Tuning", "", TUNING, "", "| | setting | last | best | mean w |", "|---|---|---:|---:|---:|"]
    for method in METHODS:
        for trial in grid(method, records):
            record = records.get(trial.name)
            values = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in trial.setting)
            if record is None or "diverged" in record:
                what = "not run" if record is None else "diverged"
                lines.append(f"| {name_of(method)} | {values} | {what} | | |")
                continue
            robust = [100 * row["robust"] for row in record["history"]]
            weight = weight_text(method, weight_of(record))
            lines.append(f"| {name_of(method)} | {values} | {robust[-1]:.1f} | {max(robust):.1f} | {weight} |")
    return [*lines, ""]


def _cost(records: Records) -> list[str]:
    seconds = sum(record.get("seconds", 0.0) for record in records.values())
    return [
        "## Cost",
        "",
        f"{len(records)} runs, {seconds / 3600:.1f} hours of training on one core each (the machine was shared). "
        "Repeat any row, or all that is missing:",
        "",
        "```sh",
        "python benchmarks/evidence/data.py CIFAR10.npz evidence.npz",
        "python benchmarks/evidence/run.py evidence.npz --runs runs/evidence --jobs 2",
        "python benchmarks/evidence/page.py",
        "```",
        "",
        SETTLE,
    ]


def draw(records: Records, path: Path) -> None:
    """Robust accuracy on validation images over the epochs, of the settings chosen by the last checkpoint."""
    with picture(path, (7.0, 4.2)) as drawn:
        axes = drawn.subplots()
        decayed: set[int] = set()
        for method in _tuned(records):
            runs = [records[t.name] for t in _by(method, "last", records) if t.name in records]
            runs = [run for run in runs if "diverged" not in run]
            if not runs:
                continue
            curves = [{row["epoch"]: 100 * row["robust"] for row in run["history"]} for run in runs]
            mean_curve(axes, curves, style_of(method), name_of(method))
            decayed |= {epoch for run in runs for epoch in run["config"]["decay_epochs"]}
        mark_decays(axes, decayed)
        axes.set(xlabel="epoch", ylabel="robust accuracy, validation set, %")
        legend_below(drawn)


INTRODUCTION = """# Does it help?

This page is generated (`python benchmarks/evidence/page.py`) from the records in `benchmarks/evidence/records`, which
`benchmarks/evidence/run.py` wrote by the
[protocol](../../benchmarks/evidence/protocol.md), committed before them.
"""

VERDICTS = """Differences in points of robust accuracy (PGD-20 on the margin loss, 5,000 test images), runs paired by
seed, with 95 % intervals of the mean (Student's t). *Yes*: the interval lies above zero. *No*: it lies below one point
(of overfitting: five), so that a gain worth the change is excluded. *Cannot tell*: neither."""

ACCURACIES = """Per cent, mean ± standard deviation over seeds; in brackets the paper's, of ResNet-18 on all of
CIFAR-10. *lr × w* is the learning rate times the mean weight: methods are comparable in the length of their steps where
it is alike; F-ENGM lengthens gradients that all but vanish, so that its mean weight says nothing. AA: AutoAttack on
500 images, three seeds. Overfit: (best − last) / best."""

CONTROLS = """ENGM by its choice for the last checkpoint, and steps of the same length without its choice of examples:
the mean weight of every batch for all of its examples, the weights of every batch permuted among its examples, and
momentum SGD with the learning rate multiplied by ENGM's mean weight. Where these match ENGM, its effect is one of the
learning rate or of noise."""

TUNING = """Robust accuracy on validation images, one seed that is used nowhere else."""

SETTLE = """A GPU would settle what this regime cannot say of the paper's: `engm compare --data cifar10 --optimizers
msgd,a-engm,engm --seeds 3 --out runs/cifar10`, nine runs of ResNet-18 with PGD-10 and 100 epochs, each 390 × 100 steps
of eleven forward and backward passes."""


def main() -> None:
    """The command."""
    records = read_records()
    if _tuned(records):
        draw(records, DOCS / "evidence.svg")
    write_text_atomic(DOCS / "evidence.md", page(records))


if __name__ == "__main__":
    main()
