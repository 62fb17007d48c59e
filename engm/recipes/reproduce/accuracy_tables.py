"""Tables of accuracies and robust overfitting, and the first of them: Table 2, by optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from ..methods import LABELS
from .accuracy_pictures import draw_accuracies, size_of
from .accuracy_rows import AUTOATTACK, BEST, COLUMNS, LAST, OVERFIT, Figure_, Row
from .analysis import Analysis, Request
from .budgets import Budget
from .cells import Cell
from .measures import AutoAttack, Measure
from .outcome import Outcome, Table
from .published import TABLE2
from .statistics import Expected, Finding, Mean, Record, by_seed, figure, mean_of, paired_finding, selected


def accuracy_table(records: Sequence[Record], rows: Sequence[Row], first: str) -> Table:
    """The measured figures, mean ± standard deviation over seeds, with the paper's in brackets."""
    shown = [row for row in rows if selected(records, row.labels) or _diverged(records, row.labels)]
    lines = []
    for row in shown:
        cells = []
        for read, name in COLUMNS.values():
            paper = None if row.published is None else getattr(row.published, name)
            measured = mean_of(records, row.labels, read).text(scale=100)
            cells.append(measured if paper is None else f"{measured} ({paper:g})")
        n, lost = len(selected(records, row.labels)), _diverged(records, row.labels)
        lines.append([row.label, *cells, f"{n}{f', {lost} diverged' if lost else ''}"])
    return Table(_caption(records), [first, *COLUMNS, "runs"], lines)


def _diverged(records: Sequence[Record], labels: Mapping[str, Any]) -> int:
    return sum(labels.items() <= r["labels"].items() and "diverged" in r for r in records)


def _caption(records: Sequence[Record]) -> str:
    done = selected(records, {})
    tests = "/".join(str(n) for n in sorted({r["data"]["test"] for r in done}))
    attacked = {r["measured_on"]["autoattack"] or r["data"]["test"] for r in done if "autoattack" in r["measured_on"]}
    under = (
        f"under AutoAttack (on {'/'.join(map(str, sorted(attacked)))} of them)" if attacked else "AutoAttack (not run)"
    )
    return (
        f"Per cent of {tests} test images, mean ± standard deviation of single runs; in brackets the paper's, of its "
        "own network and all of its data. Natural, Best and AA: the checkpoint that was best on the validation "
        f"set, on clean images, under the evaluation attack (PGD-20 on the margin loss) and {under}; Last: the last "
        "checkpoint. Overfit: (best - last) / best."
    )


def accuracy_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The figures of every run, for the CSV file."""
    names = sorted({name for r in records for name in r["labels"]})
    return [
        {
            **{name: r["labels"].get(name) for name in names},
            **{key: read(r) for key, (read, _) in COLUMNS.items()},
            "best_epoch": r.get("best_epoch"),
            "alpha": r.get("alpha"),
            "seconds": r.get("seconds"),
            "diverged": "diverged" in r,
        }
        for r in records
    ]


def accuracy_finding(
    claim: str,
    records: Sequence[Record],
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    value: Figure_,
    *,
    expected: Expected = "greater",
) -> Finding:
    """A :func:`~engm.recipes.reproduce.statistics.paired_finding` of fractions, which it shows in per cent."""
    return paired_finding(claim, records, one, other, value, expected=expected, unit=" %", scale=100)


def less_overfitting_finding(
    claim: str, records: Sequence[Record], one: Mapping[str, Any], other: Mapping[str, Any]
) -> Finding:
    """Whether runs of one kind overfit less than runs of another, with both robust accuracies behind the figure.

    (best - last) / best is also small where there was little to lose. So that "less overfitting" is only said of runs
    whose last checkpoint is, on the mean over the pairs, no worse than that of the others.
    """
    finding = accuracy_finding(claim, records, one, other, OVERFIT, expected="less")
    shown, worse = [], False
    for name, read in (("best", BEST), ("last", LAST)):
        first, second = by_seed(records, one, read), by_seed(records, other, read)
        seeds = sorted(first.keys() & second.keys())
        if not seeds:
            return finding
        mine, theirs = (Mean.of([100 * values[seed] for seed in seeds]).value for values in (first, second))
        shown.append(f"{name} {mine:.1f} against {theirs:.1f} %")
        worse = mine < theirs  # of the last checkpoint, which comes last
    measured = f"{finding.measured}; {', '.join(shown)}"
    if finding.verdict == "agrees" and worse:
        return Finding(
            claim, f"{measured}: the last checkpoint is worse, so this is not less overfitting", "cannot say"
        )
    return Finding(claim, measured, finding.verdict)


def outcome(records: Sequence[Record], rows: Sequence[Row], first: str, findings: Sequence[Finding]) -> Outcome:
    """One table of accuracies, whose first column has the given heading, with its curves as a picture."""
    return Outcome(
        [accuracy_table(records, rows, first)],
        findings,
        accuracy_rows(records),
        lambda drawn: draw_accuracies(records, rows, drawn),
        size_of(records, rows),
    )


def autoattack(budget: Budget) -> tuple[Measure, ...]:
    """What these tables measure on a run."""
    return (AutoAttack(budget.attacked),)


# -- Table 2 -----------------------------------------------------------------------------------------------------------


def optimizer_cells(request: Request) -> list[Cell]:
    """The runs of Table 2: every optimizer, seed by seed."""
    return [
        request.cell({}, optimizer=name, seed=seed, measures=lambda config: autoattack(request.budget))
        for seed in request.seeds
        for name in request.optimizers
    ]


def optimizer_rows() -> list[Row]:
    """The rows of Table 2, in the order of the paper."""
    return [Row(label, {"optimizer": name}, TABLE2.get(name)) for name, label in LABELS.items()]


def summarise_optimizers(records: Sequence[Record]) -> Outcome:
    """The outcome of Table 2."""
    rows = optimizer_rows()
    findings = [overfitting_finding(records), *_against_msgd(records)]
    return outcome(records, rows, "optimizer", findings)


def overfitting_finding(records: Sequence[Record]) -> Finding:
    """Whether MSGD overfits at all, without which its reduction means nothing."""
    both = [{**r, "labels": {**r["labels"], "look": look}} for r in records for look in ("best", "last")]
    return accuracy_finding(
        "Training with MSGD overfits: robust accuracy falls from the best to the last checkpoint (50.9 to 44.2)",
        both,
        {"optimizer": "msgd", "look": "best"},
        {"optimizer": "msgd", "look": "last"},
        lambda r: figure("test", r["labels"]["look"], "robust")(r),
    )


def _against_msgd(records: Sequence[Record], optimizers: Sequence[str] = ("engm", "a-engm", "n-engm")) -> list[Finding]:
    """The paper's claims about ENGM and its two approximations against MSGD."""
    found = []
    for name in optimizers:
        if not selected(records, {"optimizer": name}):
            continue
        label = LABELS[name]
        mine, msgd = TABLE2[name], TABLE2["msgd"]
        one, other = {"optimizer": name}, {"optimizer": "msgd"}
        claim = f"{label} overfits less than MSGD ({mine.overfit} against {msgd.overfit} %)"
        found.append(less_overfitting_finding(claim, records, one, other))
        claims: list[tuple[str, Figure_, float | None, float | None]] = [
            ("'s last checkpoint is more robust than MSGD's", LAST, mine.last, msgd.last),
            ("'s best checkpoint is more robust than MSGD's", BEST, mine.best, msgd.best),
            (
                "'s best checkpoint is more robust than MSGD's under AutoAttack",
                AUTOATTACK,
                mine.autoattack,
                msgd.autoattack,
            ),
        ]
        found += [
            accuracy_finding(f"{label}{claim} ({ours} against {theirs} %)", records, one, other, read)
            for claim, read, ours, theirs in claims
        ]
    return found


TABLE_2 = Analysis(
    "table2",
    "Optimizers: accuracy and robust overfitting (Table 2, Fig. 5h)",
    optimizer_cells,
    summarise_optimizers,
    itemgetter("optimizer"),
)
