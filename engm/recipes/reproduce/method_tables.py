"""Table 3, its supplement for l2, and Fig. 1: what ENGM adds to each of four training methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..methods import LABELS
from ..pictures import Dots, Look, dot_plot, legend_below, look_handles, style_of
from ..setups import SETUPS
from .accuracy_rows import AUTOATTACK, OVERFIT, Figure_, Row
from .accuracy_tables import accuracy_finding, accuracy_rows, autoattack, outcome
from .analysis import Analysis, Request, data_name
from .cells import Cell
from .outcome import Outcome, Table
from .published import MEAN_GAIN, TABLE3, Accuracies
from .statistics import Finding, Record, mean_of, paired_finding, selected

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = {"vanilla": "Vanilla", "trades": "TRADES", "mart": "MART", "awp": "TRADES + AWP"}
OPTIMIZERS = ("msgd", "engm")


def method_cells(request: Request, threat: str, data: Sequence[str] | None = None) -> list[Cell]:
    """The runs of Table 3: four training methods as their authors set them up, two optimizers, every data set.

    Args:
        request: what the user asks for.
        threat: ball of the attacks, in training and in evaluation.
        data: the data sets, if not those of the request.
    """
    return [
        request.cell(
            {"data": data_name(name), "method": method, "threat": threat},
            optimizer=optimizer,
            seed=seed,
            measures=lambda config: autoattack(request.budget),
            data=name,
            threat=threat,
            defaults=request.setup(method),
            **SETUPS[method].chosen,
        )
        for seed in request.seeds
        for name in (request.data if data is None else data)
        for method in METHODS
        for optimizer in OPTIMIZERS
    ]


def row_of(labels: Mapping[str, Any]) -> str:
    """The name of a row of Table 3: ``cifar10-trades-engm``."""
    return f"{labels['data']}-{labels['method']}-{labels['optimizer']}"


def summarise_methods(records: Sequence[Record]) -> Outcome:
    """The outcome of Table 3 or of its supplement."""
    labels = {(r["labels"]["data"], r["labels"]["threat"]): None for r in records}
    rows = [
        Row(
            f"{data}, {threat}, {METHODS[method]}, {LABELS[optimizer]}",
            {"data": data, "threat": threat, "method": method, "optimizer": optimizer},
            published_row(data, threat, method, optimizer),
            f"{data}, {threat}",
            number,
        )
        for data, threat in labels
        for number, method in enumerate(METHODS)
        for optimizer in OPTIMIZERS
    ]
    findings = [
        accuracy_finding(
            f"With {METHODS[method]} on {data} ({threat}), ENGM's best checkpoint is more robust (AutoAttack)",
            records,
            {"data": data, "threat": threat, "method": method, "optimizer": "engm"},
            {"data": data, "threat": threat, "method": method, "optimizer": "msgd"},
            AUTOATTACK,
        )
        for data, threat in labels
        for method in METHODS
    ]
    findings += [mean_gain(records, threat) for threat in dict.fromkeys(threat for _, threat in labels)]
    return outcome(records, rows, "data, threat, method, optimizer", findings)


def published_row(data: str, threat: str, method: str, optimizer: str) -> Accuracies | None:
    """The paper's row; ``None`` for l2, which is in a supplement, and for data that the paper has not."""
    return TABLE3.get((data.lower(), method, optimizer)) if threat == "linf" else None


def mean_gain(records: Sequence[Record], threat: str) -> Finding:
    """Whether ENGM is more robust on the mean over methods and data sets."""
    means: list[Record] = []
    seeds = {r["labels"]["seed"] for r in records}
    whole = {row_of({**r["labels"], "optimizer": ""}) for r in records}
    for seed in sorted(seeds):
        for optimizer in OPTIMIZERS:
            mine = selected(records, {"threat": threat, "seed": seed, "optimizer": optimizer})
            found = [value for r in mine if (value := AUTOATTACK(r)) is not None]
            if found and len(found) == len(whole):  # a mean without a run that diverged is of other runs
                means.append({"labels": {"seed": seed, "optimizer": optimizer}, "mean": fmean(found)})
    return paired_finding(
        f"Under AutoAttack ({threat}), ENGM gains {MEAN_GAIN[threat]} points on the mean over methods and data sets "
        "(judged: above 0)",
        means,
        {"optimizer": "engm"},
        {"optimizer": "msgd"},
        lambda r: float(r["mean"]),
        expected="greater",
        unit=" %",
        scale=100,
    )


TABLE_3 = Analysis(
    "table3",
    "Training methods with MSGD and ENGM, l-inf (Table 3)",
    partial(method_cells, threat="linf"),
    summarise_methods,
    row_of,
)
TABLE_3_L2 = Analysis(
    "table3-l2",
    "Training methods with MSGD and ENGM, l2 (Table 3's supplement)",
    partial(method_cells, threat="l2"),
    summarise_methods,
    row_of,
)

# -- Fig. 1 ------------------------------------------------------------------------------------------------------------

_FIGURES: tuple[tuple[str, str, Figure_], ...] = (
    ("autoattack", "robust accuracy, AutoAttack, test set, %", AUTOATTACK),
    ("overfit", "robust overfitting, (best − last) / best, %", OVERFIT),
)
_LOOKS = tuple(Look(LABELS[o], style_of(o).marker, full=True, colour=style_of(o).colour) for o in OPTIMIZERS)


def first_cells(request: Request) -> list[Cell]:
    """The runs of Table 3 on the first data set."""
    return method_cells(request, "linf", [request.first_data])


def summarise_first(records: Sequence[Record]) -> Outcome:
    """The outcome of Fig. 1: robust accuracy and robust overfitting of every method, with MSGD and with ENGM.

    The figure's caption is "Replacing MSGD with ENGM for outer optimization in AT results in consistent improvement of
    robust accuracy and generalization". Its drawing is not at hand; these are the two figures that the caption names.
    """
    lines = []
    for method, label in METHODS.items():
        line = [label]
        for name, _, read in _FIGURES:
            for optimizer in OPTIMIZERS:
                measured = mean_of(records, {"method": method, "optimizer": optimizer}, read).text(scale=100)
                paper = getattr(TABLE3["cifar10", method, optimizer], name)
                line.append(f"{measured} ({paper:g})")
        lines.append(line)
    table = Table(
        "Per cent, mean ± standard deviation of single runs; in brackets what the paper prints for CIFAR-10 in "
        "Table 3. The figure itself prints no numbers.",
        ["method", *(f"{'AA' if name == 'autoattack' else 'Overfit'}, {LABELS[o]}" for name, *_ in _FIGURES
                     for o in OPTIMIZERS)],
        lines,
    )  # fmt: skip
    findings = [
        accuracy_finding(
            f"{label}: with ENGM {'AutoAttack leaves more' if name == 'autoattack' else 'there is less overfitting'}",
            records,
            {"method": method, "optimizer": "engm"},
            {"method": method, "optimizer": "msgd"},
            read,
            expected="greater" if name == "autoattack" else "less",
        )
        for method, label in METHODS.items()
        for name, _, read in _FIGURES
    ]
    return Outcome([table], findings, accuracy_rows(records), lambda drawn: _draw_first(records, drawn), (10, 5.2))


def _draw_first(records: Sequence[Record], drawn: Figure) -> None:
    """Draws a line a method, from MSGD's dot to ENGM's: above these runs, below the paper's, at one scale."""
    axes = drawn.subplots(2, len(_FIGURES), sharex="col", sharey=True)
    for column, (name, title, read) in enumerate(_FIGURES):
        for axis, whose in zip(axes[:, column], ("these runs", "the paper, CIFAR-10"), strict=True):
            rows = []
            for method, label in METHODS.items():
                if whose == "these runs":
                    means = [mean_of(records, {"method": method, "optimizer": o}, read) for o in OPTIMIZERS]
                    dots = [(100 * mean.value, 100 * mean.deviation) if mean.n else None for mean in means]
                else:
                    figures = [getattr(TABLE3["cifar10", method, o], name) for o in OPTIMIZERS]
                    dots = [(figure, float("nan")) for figure in figures]
                rows.append(Dots(label, "black", dots))
            dot_plot(axis, rows, looks=_LOOKS, joined=True)
            axis.set(title=whose, xlabel=title)
    legend_below(drawn, look_handles(rows, _LOOKS))


FIG_1 = Analysis(
    "fig1", "MSGD replaced by ENGM: robust accuracy and overfitting (Fig. 1)", first_cells, summarise_first, row_of
)
