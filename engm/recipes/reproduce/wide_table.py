"""Table 4: robust systems on a wide network, what the paper prints of them beside what runs here come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING, Any

from ..methods import LABELS
from ..pictures import Dots, Look, dot_plot, legend_below, look_handles, style_of
from ..setups import SETUPS
from .accuracy_rows import AUTOATTACK, NATURAL
from .accuracy_tables import accuracy_finding, accuracy_rows, autoattack
from .analysis import Analysis, Request
from .cells import Cell
from .outcome import Outcome, Table
from .published import TABLE4
from .statistics import Record, mean_of, selected

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class System:
    """A training method of Table 4.

    Attributes:
        label: as the table has it, with its reference.
        setup: its name in :data:`~engm.recipes.setups.SETUPS`.
    """

    label: str
    setup: str


SYSTEMS = {
    "ates": System("ATES [36]", "ates"),
    "bs": System("BS [5]", "bs"),
    "lbgat": System("LBGAT [9]", "lbgat"),
    "trades": System("TRADES [47]", "trades"),
    "mart": System("MART [40]", "mart-wide"),
    "berm": System("BERM [19]", "berm"),
    "fat": System("FAT [48]", "fat"),
    "awp": System("AWP [42]", "awp"),
}


def wide_cells(request: Request) -> list[Cell]:
    """The runs of Table 4: every method as its authors set it up, on a wide network."""
    return [
        request.cell(
            {"model": request.budget.wide_model, "method": method},
            optimizer=optimizer,
            seed=seed,
            measures=lambda config: autoattack(request.budget),
            model=request.budget.wide_model,
            width=None,
            defaults=request.setup(SYSTEMS[method].setup, own_length=True),
            **SETUPS[SYSTEMS[method].setup].chosen,
        )
        for seed in request.seeds
        for method, optimizer in TABLE4
    ]


def row_of(labels: Mapping[str, Any]) -> str:
    """The name of a row of Table 4: ``awp-engm``."""
    return f"{labels['method']}-{labels['optimizer']}"


def summarise_wide(records: Sequence[Record]) -> Outcome:
    """The outcome of Table 4: all of its rows, the paper's figures and ours in columns of their own."""
    lines = []
    for (method, optimizer), printed in TABLE4.items():
        labels = {"method": method, "optimizer": optimizer}
        runs = len(selected(records, labels))
        measured = [mean_of(records, labels, read).text(scale=100) for read in (NATURAL, AUTOATTACK)]
        lines.append([
            SYSTEMS[method].label, LABELS[optimizer], f"{printed.natural:.2f}", f"{printed.autoattack:.2f}",
            *(measured if runs else ["not run", "not run"]), str(runs),
        ])  # fmt: skip
    table = Table(
        "Per cent. Quoted: as the paper prints it, of WRN-34-10 and CIFAR-10. Measured: these runs alone, mean ± "
        f"standard deviation of single ones, of {_measured_on(records)}; natural accuracy and AutoAttack of the "
        "checkpoint that was best on the validation set.",
        ["method", "optimizer", "quoted: natural", "quoted: AA", "measured: natural", "measured: AA", "runs"],
        lines,
    )
    msgd = TABLE4["awp", "msgd"].autoattack
    findings = [
        accuracy_finding(
            f"AWP with {LABELS[name]} is more robust than with MSGD (AutoAttack, {TABLE4['awp', name].autoattack} "
            f"against {msgd} %)",
            records,
            {"method": "awp", "optimizer": name},
            {"method": "awp", "optimizer": "msgd"},
            AUTOATTACK,
        )
        for name in ("n-engm", "engm")
    ]
    return Outcome([table], findings, accuracy_rows(records), lambda drawn: _draw(records, drawn), (10, 5))


def _measured_on(records: Sequence[Record]) -> str:
    """Network and data of the runs."""
    done = selected(records, {})
    return " and ".join(dict.fromkeys(f"{r['config']['model']} and {r['data']['name']}" for r in done)) or "no run"


_LOOKS = (Look("natural", "o", full=False), Look("AutoAttack", "D", full=True))


def _draw(records: Sequence[Record], drawn: Figure) -> None:
    """Draws a line a row of the table: on the left these runs, on the right the paper's, at one scale."""
    ours, paper = drawn.subplots(1, 2, sharex=True)
    measured, quoted = [], []
    for (method, optimizer), printed in TABLE4.items():
        means = [mean_of(records, {"method": method, "optimizer": optimizer}, read) for read in (NATURAL, AUTOATTACK)]
        dots = [(100 * mean.value, 100 * mean.deviation) if mean.n else None for mean in means]
        label = f"{SYSTEMS[method].label}, {LABELS[optimizer]}"
        colour = style_of(optimizer).colour
        measured.append(Dots(label, colour, dots))
        quoted.append(Dots("", colour, [(printed.natural, nan), (printed.autoattack, nan)]))
    dot_plot(ours, measured, looks=_LOOKS)
    dot_plot(paper, quoted, looks=_LOOKS, names=False)
    for place, row in enumerate(measured):
        if not any(row.values):
            ours.text(
                0.5, place, "not run", transform=ours.get_yaxis_transform(), ha="center", va="center", color="grey"
            )
    ours.set(title="measured: these runs", xlabel="accuracy, test set, %")
    paper.set(title="quoted: the paper's table", xlabel="accuracy, test set, %")
    legend_below(drawn, look_handles(quoted, _LOOKS))


TABLE_4 = Analysis("table4", "Robust systems on a wide network (Table 4)", wide_cells, summarise_wide, row_of)
