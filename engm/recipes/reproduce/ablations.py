"""Fig. 5: what one setting does, everything else alike; and the learning curves of its last panel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

from ..methods import LABELS
from ..pictures import legend_below, style_of
from .accuracy_pictures import draw_curves
from .accuracy_rows import AUTOATTACK, BEST, LAST, NATURAL, OVERFIT, Figure_, Row
from .accuracy_tables import (
    TABLE_2,
    accuracy_finding,
    accuracy_rows,
    accuracy_table,
    less_overfitting_finding,
    optimizer_cells,
    optimizer_rows,
    summarise_optimizers,
)
from .analysis import Analysis, Request
from .budgets import Budget
from .cells import Cell
from .measures import AutoAttack, Measure
from .outcome import Outcome, Table
from .statistics import Finding, Record, figure, mean_of, selected

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS = 3  # panels beside each other
VALIDATION: Figure_ = figure("validation", "robust")


@dataclass(frozen=True)
class Ablation:
    """What the panels of one setting are made from.

    Attributes:
        name: the first of its panels, by which the runs are labelled.
        setting: its name in :class:`~engm.recipes.config.RunConfig`.
        shown: its name in text.
        values: values of the setting by optimizer; empty for the thresholds, which are the budget's.
        special: other settings of the runs.
    """

    name: str
    setting: str
    shown: str
    values: dict[str, tuple[float, ...]]
    special: dict[str, Any]

    def cells(self, request: Request) -> list[Cell]:
        """The runs of the panel, seed by seed, optimizer by optimizer, value by value."""
        axis = self.values or _thresholds(request.budget)
        return [
            request.cell(
                {"panel": self.name, self.setting: value},
                optimizer=optimizer,
                seed=seed,
                measures=lambda config: _autoattack(request.budget),
                **{**self.special, **self._axis(value)},
            )
            for seed in request.seeds
            for optimizer, values in axis.items()
            for value in values
        ]

    def _axis(self, value: float | None) -> dict[str, Any]:
        if value is None:
            return {}
        typed = {"alpha": str, "tau": int}.get(self.setting, float)
        return {self.setting: typed(value)}

    def found(self, records: Sequence[Record]) -> dict[str, list[float]]:
        """The values of which there are runs (diverged ones too) by optimizer; MSGD without a threshold is left out."""
        mine = [r["labels"] for r in records if r["labels"]["panel"] == self.name]
        names = dict.fromkeys(labels["optimizer"] for labels in mine if labels[self.setting] is not None)
        return {
            name: sorted({labels[self.setting] for labels in mine if labels["optimizer"] == name}) for name in names
        }


def _thresholds(budget: Budget) -> dict[str, tuple[float | None, ...]]:
    """The thresholds: ENGM's, a tenth of them for N-ENGM, and none for MSGD, which is ENGM without one."""
    return {"engm": budget.alphas, "n-engm": tuple(round(a / 10, 6) for a in budget.alphas), "msgd": (None,)}


ABLATIONS = (
    Ablation("fig5a", "alpha", "α", {}, {}),
    Ablation("fig5d", "tau", "τ", {"a-engm": (1, 10, 50, 100, 300)}, {}),
    Ablation(
        "fig5f",
        "beta",
        "λ of TRADES",
        {"msgd": (1.0, 3.0, 6.0, 9.0), "engm": (1.0, 3.0, 6.0, 9.0)},
        {"objective": "trades"},
    ),
    Ablation(
        "fig5g",
        "weight_decay",
        "weight decay",
        {"msgd": (0.0, 1e-4, 5e-4, 1e-3, 5e-3), "engm": (0.0, 1e-4, 5e-4, 1e-3, 5e-3)},
        {},
    ),
)


def _autoattack(budget: Budget) -> tuple[Measure, ...]:
    """What these figures measure on a run: AutoAttack, where the budget has it."""
    return () if budget.attacked_in_sweeps == 0 else (AutoAttack(budget.attacked_in_sweeps),)


PANELS: dict[str, tuple[Figure_, str]] = {
    "natural": (NATURAL, "natural accuracy, test set, %"),
    "best": (BEST, "PGD-20, best, test set, %"),
    "last": (LAST, "PGD-20, last, test set, %"),
    "aa": (AUTOATTACK, "AutoAttack, best, test set, %"),
    "overfit": (OVERFIT, "(best − last) / best, %"),
    "validation": (VALIDATION, "PGD-20, best, validation set, %"),
}


def summarise(
    records: Sequence[Record], panels: Sequence[Ablation] = ABLATIONS, drawn_figures: Sequence[str] = tuple(PANELS)
) -> Outcome:
    """The outcome of one setting or of all.

    Args:
        records: of the runs.
        panels: the settings that are shown.
        drawn_figures: names out of :data:`PANELS`: what the picture shows of every setting.
    """
    shown = [panel for panel in panels if panel.found(records)]
    tables, findings = [], []
    for panel in shown:
        mine = [r for r in records if r["labels"]["panel"] == panel.name]
        rows = [
            Row(f"{LABELS[optimizer]}, {panel.shown} {value:g}", {"optimizer": optimizer, panel.setting: value}, None)
            for optimizer, values in panel.found(mine).items()
            for value in values
        ]
        if panel.setting == "alpha":
            rows.insert(0, Row(LABELS["msgd"], {"optimizer": "msgd", "alpha": None}, None))
        tables.append(accuracy_table(mine, rows, "optimizer, value"))
        if panel.setting == "alpha":
            tables.append(_validation_table(mine, rows))
            findings += [_small_alpha(mine, panel, optimizer) for optimizer in panel.found(mine)]
        elif panel.setting == "weight_decay":
            findings.append(_sensitivity(mine, panel))
    return Outcome(
        tables,
        findings,
        accuracy_rows(records),
        lambda drawn: _draw(records, shown, drawn, drawn_figures),
        (3.3 * min(ACROSS, max(2, len(drawn_figures))), 2.7 * len(shown) * ceil(len(drawn_figures) / ACROSS) + 0.4),
    )


def _validation_table(records: Sequence[Record], rows: Sequence[Row]) -> Table:
    """The accuracies on the validation set, by which a threshold may be chosen."""
    lines = []
    for row in rows:
        runs = selected(records, row.labels)
        if runs:
            best = mean_of(records, row.labels, VALIDATION)
            last = mean_of(records, row.labels, _last_validation)
            weight = mean_of(records, row.labels, _mean_weight)
            both = 50 * (best.value + last.value)
            lines.append([row.label, best.text(scale=100), last.text(scale=100), f"{both:.1f}", weight.text(2)])
    return Table(
        "The same runs on the validation set, by which a threshold is chosen: robust accuracy in per cent, best and "
        "last, their mean, and the mean weight over the run.",
        ["optimizer, value", "best", "last", "mean of both", "mean w"],
        lines,
    )


def _last_validation(record: Record) -> float | None:
    looks = [row["robust"] for row in record["history"] if "robust" in row]
    return float(looks[-1]) if looks else None


def _mean_weight(record: Record) -> float:
    weights = [float(row["weight_mean"]) for row in record["history"]]
    return sum(weights) / len(weights)


def _small_alpha(records: Sequence[Record], panel: Ablation, optimizer: str) -> Finding:
    values = panel.found(records)[optimizer]
    return less_overfitting_finding(
        f"{LABELS[optimizer]}: overfitting decreases for small α ({values[0]:g} against {values[-1]:g})",
        records,
        {"optimizer": optimizer, panel.setting: values[0]},
        {"optimizer": optimizer, panel.setting: values[-1]},
    )


def _sensitivity(records: Sequence[Record], panel: Ablation) -> Finding:
    """Whether ENGM's best robust accuracy has a smaller range over the values, seed by seed, than MSGD's."""
    ranges: list[Record] = []
    for optimizer, values in panel.found(records).items():
        for seed in {r["labels"]["seed"] for r in records}:
            mine = selected(records, {"optimizer": optimizer, "seed": seed})
            found = [value for r in mine if (value := BEST(r)) is not None]
            if len(found) == len(values):  # a range without the value that diverged would be too small
                labels = {"optimizer": optimizer, "seed": seed}
                ranges.append({"labels": labels, "range": max(found) - min(found)})
    return accuracy_finding(
        "ENGM is less sensitive to weight decay than MSGD (range of the best robust accuracy over the values)",
        ranges,
        {"optimizer": "engm"},
        {"optimizer": "msgd"},
        figure("range"),
        expected="less",
    )


def _draw(records: Sequence[Record], panels: Sequence[Ablation], drawn: Figure, names: Sequence[str]) -> None:
    done = selected(records, {})
    # Small budgets leave AutoAttack out: what it would show is not drawn then.
    figures = [PANELS[name] for name in names if any(PANELS[name][0](r) is not None for r in done)]
    lines = ceil(len(figures) / ACROSS)
    axes = drawn.subplots(lines * len(panels), min(ACROSS, len(figures)), squeeze=False)
    for number, panel in enumerate(panels):
        places = axes[lines * number : lines * (number + 1)].flatten()
        for axis, (read, title) in zip(places, figures, strict=False):
            if all(read(r) is None for r in done if r["labels"]["panel"] == panel.name):
                axis.set_axis_off()
                continue
            _draw_panel(records, panel, read, axis)
            axis.set(ylabel=title, xlabel=panel.shown if panel.setting != "alpha" else "α of ENGM (N-ENGM: a tenth)")
        for empty in places[len(figures) :]:
            empty.set_axis_off()
    legend_below(drawn)


def _draw_panel(records: Sequence[Record], panel: Ablation, read: Figure_, axis: Axes) -> None:
    found = panel.found(records)
    for optimizer, values in found.items():
        labels = {"panel": panel.name, "optimizer": optimizer}
        means = [mean_of(records, {**labels, panel.setting: value}, read) for value in values]
        deviations = [0.0 if m.n < 2 else 100 * m.deviation for m in means]
        axis.errorbar(
            range(len(values)),
            [100 * m.value for m in means],
            deviations if any(deviations) else None,
            **style_of(optimizer).line(),
            label=LABELS[optimizer],
        )
    reference = mean_of(records, {"panel": panel.name, "optimizer": "msgd", panel.setting: None}, read)
    if reference.n:
        plain = style_of("msgd")
        axis.axhline(100 * reference.value, color=plain.colour, linestyle=plain.dash, label=LABELS["msgd"])
    first = next(iter(found.values()))
    axis.set_xticks(range(len(first)), [f"{value:g}" for value in first])


def summarise_curves(records: Sequence[Record]) -> Outcome:
    """The outcome of Fig. 5h: Table 2 with the second half of its learning curves.

    The paper shows the last 60 of 120 epochs on the test set. These are on the validation set, since the test set is
    looked at once.
    """
    whole = summarise_optimizers(records)
    rows = optimizer_rows()

    def draw(drawn: Figure) -> None:
        done = selected(records, {})
        late = [{**r, "history": r["history"][len(r["history"]) // 2 :]} for r in done]
        draw_curves(late, rows, [style_of(row.labels["optimizer"]) for row in rows], drawn.subplots())
        legend_below(drawn)

    return Outcome(whole.tables, whole.findings, whole.rows, draw, (7, 4))


def _every_panel(request: Request) -> list[Cell]:
    return [cell for panel in ABLATIONS for cell in panel.cells(request)]


_ALPHA, _TAU, _BETA, _DECAY = ABLATIONS
# The panels of the figure by their letter in the paper: the setting, what the paper plots over it, and what is drawn
# here. The first panel of a setting has every figure; robust accuracy is drawn under PGD-20 as well, because small
# budgets run no AutoAttack.
_LETTERS: dict[str, tuple[Ablation, str, tuple[str, ...]]] = {
    "a": (_ALPHA, "natural accuracy, with all other figures", tuple(PANELS)),
    "b": (_ALPHA, "robust accuracy", ("aa", "best")),
    "c": (_ALPHA, "robust overfitting", ("overfit", "best", "last")),
    "d": (_TAU, "natural accuracy, with all other figures", tuple(PANELS)),
    "e": (_TAU, "robust accuracy", ("aa", "best")),
    "f": (_BETA, "natural and robust accuracy", tuple(PANELS)),
    "g": (_DECAY, "robust accuracy", tuple(PANELS)),
}


def _panel(letter: str) -> Analysis:
    setting, shown, figures = _LETTERS[letter]
    return Analysis(
        f"fig5{letter}",
        f"{setting.shown} alone: {shown} (Fig. 5{letter})",
        setting.cells,
        partial(summarise, panels=[setting], drawn_figures=figures),
    )


FIG_5 = [
    Analysis("fig5", "Thresholds, intervals, λ of TRADES, weight decay (Fig. 5)", _every_panel, summarise),
    *map(_panel, _LETTERS),
    Analysis(
        "fig5h",
        "Optimizers: learning curves of the runs of Table 2 (Fig. 5h)",
        optimizer_cells,
        summarise_curves,
        TABLE_2.row_of,
    ),
]
