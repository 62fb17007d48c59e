"""Tables 2, 3 and 4: accuracies and robust overfitting by optimizer, training method and network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..methods import LABELS
from .accuracy_pictures import draw_accuracies, size_of
from .accuracy_rows import AUTOATTACK, BEST, COLUMNS, LAST, OVERFIT, Figure_, Row
from .analysis import Analysis, Request, data_name
from .budgets import Budget
from .cells import Cell
from .measures import AutoAttack, Measure
from .outcome import Outcome, Table
from .published import TABLE2, TABLE3, TABLE4
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


def _outcome(records: Sequence[Record], rows: Sequence[Row], first: str, findings: Sequence[Finding]) -> Outcome:
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
    return _outcome(records, rows, "optimizer", findings)


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
    "table2", "Optimizers: accuracy and robust overfitting (Table 2, Fig. 5h)", optimizer_cells, summarise_optimizers
)

# -- Table 3 -----------------------------------------------------------------------------------------------------------

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "vanilla": ("Vanilla", {"objective": "pgd"}),
    "trades": ("TRADES", {"objective": "trades"}),
    "mart": ("MART", {"objective": "mart"}),
    "awp": ("TRADES + AWP", {"objective": "trades", "awp": True}),
}


def method_cells(request: Request) -> list[Cell]:
    """The runs of Table 3: four training methods, two optimizers, two threats, every data set."""
    length = {} if request.budget.long_epochs is None else {"epochs": request.budget.long_epochs}
    return [
        request.cell(
            {"data": data_name(data), "method": method, "threat": threat},
            optimizer=optimizer,
            seed=seed,
            measures=lambda config: autoattack(request.budget),
            data=data,
            threat=threat,
            defaults=length,
            **special,
        )
        for seed in request.seeds
        for data in request.data
        for threat in ("linf", "l2")
        for method, (_, special) in METHODS.items()
        for optimizer in ("msgd", "engm")
    ]


def summarise_methods(records: Sequence[Record]) -> Outcome:
    """The outcome of Table 3."""
    labels = {(r["labels"]["data"], r["labels"]["threat"]): None for r in records}
    rows = [
        Row(
            f"{data}, {threat}, {METHODS[method][0]}, {LABELS[optimizer]}",
            {"data": data, "threat": threat, "method": method, "optimizer": optimizer},
            TABLE3.get((data.lower(), method, optimizer)) if threat == "linf" else None,
            f"{data}, {threat}",
            number,
        )
        for data, threat in labels
        for number, method in enumerate(METHODS)
        for optimizer in ("msgd", "engm")
    ]
    findings = [
        accuracy_finding(
            f"With {METHODS[method][0]} on {data} ({threat}), ENGM's best checkpoint is more robust (AutoAttack)",
            records,
            {"data": data, "threat": threat, "method": method, "optimizer": "engm"},
            {"data": data, "threat": threat, "method": method, "optimizer": "msgd"},
            AUTOATTACK,
        )
        for data, threat in labels
        for method in METHODS
    ]
    return _outcome(records, rows, "data, threat, method, optimizer", findings)


TABLE_3 = Analysis(
    "table3", "Training methods with MSGD and ENGM, l-inf and l2 (Table 3)", method_cells, summarise_methods
)

# -- Table 4 -----------------------------------------------------------------------------------------------------------


def wide_cells(request: Request) -> list[Cell]:
    """The runs of Table 4: TRADES with AWP on a wide network."""
    length = {} if request.budget.long_epochs is None else {"epochs": request.budget.long_epochs}
    return [
        request.cell(
            {"model": request.budget.wide_model},
            optimizer=optimizer,
            seed=seed,
            measures=lambda config: autoattack(request.budget),
            model=request.budget.wide_model,
            width=None,
            defaults=length,
            **METHODS["awp"][1],
        )
        for seed in request.seeds
        for optimizer in ("msgd", "n-engm", "engm")
    ]


def summarise_wide(records: Sequence[Record]) -> Outcome:
    """The outcome of Table 4."""
    rows = [Row(f"AWP, {LABELS[name]}", {"optimizer": name}, TABLE4[name]) for name in ("msgd", "n-engm", "engm")]
    findings = [
        accuracy_finding(
            f"AWP with {LABELS[name]} is more robust than with MSGD (AutoAttack, {TABLE4[name].autoattack} against "
            f"{TABLE4['msgd'].autoattack} %)",
            records,
            {"optimizer": name},
            {"optimizer": "msgd"},
            AUTOATTACK,
        )
        for name in ("n-engm", "engm")
    ]
    return _outcome(records, rows, "method", findings)


TABLE_4 = Analysis("table4", "A wide network with AWP (Table 4)", wide_cells, summarise_wide)
