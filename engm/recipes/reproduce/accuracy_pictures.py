"""The picture of a table of accuracies: learning curves, and what the runs came to beside what the paper prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import TYPE_CHECKING, Any

from ..pictures import Dots, Style, dot_plot, legend_below, look_handles, mark_decays, mean_curve, style_of
from .accuracy_rows import AUTOATTACK, BEST, LAST, Row
from .published import Accuracies
from .statistics import Record, mean_of, selected

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10.5  # inches


def size_of(records: Sequence[Record], rows: Sequence[Row]) -> tuple[float, float]:
    """Width and height of the picture in inches."""
    panels = _panels(records, rows)
    return WIDTH, sum(max(3.0, 0.36 * len(shown) + 0.9) for shown in panels.values()) + 0.5


def draw_accuracies(records: Sequence[Record], rows: Sequence[Row], drawn: Figure) -> None:
    """Draws one line of panels for each panel that rows name.

    From the left: robust accuracy on the validation set over the epochs, the mean over the seeds with a band of one
    standard deviation; best, last and AutoAttack on the test set; and, at the same scale, the paper's.
    """
    panels = _panels(records, rows)
    if not panels:
        return
    published = any(row.published is not None for shown in panels.values() for row in shown)
    axes = drawn.subplots(
        len(panels),
        3 if published else 2,
        squeeze=False,
        width_ratios=[4, 3, 3] if published else [3, 2],
        height_ratios=[max(3, len(shown)) for shown in panels.values()],
    )
    every: list[Dots] = []
    for (name, shown), (curves, ours, *papers) in zip(panels.items(), axes, strict=True):
        styles = [style_of(row.labels["optimizer"], row.variant) for row in shown]
        draw_curves(records, shown, styles, curves)
        measured = [
            Dots(row.label.removeprefix(f"{name}, "), style.colour, _measured(records, row))
            for row, style in zip(shown, styles, strict=True)
        ]
        dot_plot(ours, measured)
        ours.set(title=f"{name}: these runs" if name else "these runs", xlabel="robust accuracy, test set, %")
        every += measured
        for paper in papers:
            if all(row.published is None for row in shown):
                paper.set_axis_off()
                continue
            paper.sharex(ours)
            printed = [Dots("", s.colour, _printed(row.published)) for row, s in zip(shown, styles, strict=True)]
            dot_plot(paper, printed, names=False)
            paper.set(title="the paper", xlabel="robust accuracy, test set, %")
            every += printed
    legend_below(drawn, look_handles(every))


def _panels(records: Sequence[Record], rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of which there are runs, by their panel."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if selected(records, row.labels):
            found.setdefault(row.panel, []).append(row)
    return found


def draw_curves(records: Sequence[Record], rows: Sequence[Row], styles: Sequence[Style], axes: Axes) -> None:
    """Draws robust accuracy on the validation set over the epochs, a line a row, and where the learning rate decays."""
    decays: set[int] = set()
    for row, style in zip(rows, styles, strict=True):
        runs = selected(records, row.labels)
        name = row.label.removeprefix(f"{row.panel}, ")
        mean_curve(axes, [_looks(run) for run in runs], style, name)
        decays |= {epoch for run in runs for epoch in run["config"]["decay_epochs"]}
    mark_decays(axes, decays)
    axes.set(xlabel="epoch", ylabel="robust accuracy, validation set, %")


def _looks(run: Mapping[str, Any]) -> dict[int, float]:
    return {row["epoch"]: 100 * float(row["robust"]) for row in run["history"] if "robust" in row}


def _measured(records: Sequence[Record], row: Row) -> list[tuple[float, float] | None]:
    means = [mean_of(records, row.labels, read) for read in (BEST, LAST, AUTOATTACK)]
    return [(100 * mean.value, 100 * mean.deviation) if mean.n else None for mean in means]


def _printed(row: Accuracies | None) -> list[tuple[float, float] | None]:
    figures = (None, None, None) if row is None else (row.best, row.last, row.autoattack)
    return [None if figure is None else (figure, nan) for figure in figures]
