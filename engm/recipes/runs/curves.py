"""What the runs of a report look like: learning curves, means over seeds with a band, and what they came to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from ..pictures import Dots, Style, dot_plot, legend_below, look_handles, mark_decays, mean_curve, picture, style_of
from .report import Row, rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (
    ("robust", "robust accuracy, validation, %", 100.0),
    ("natural", "natural accuracy, validation, %", 100.0),
    ("loss", "adversarial training loss, nats", 1.0),
    ("weight_mean", "mean weight of examples", 1.0),
    ("norm_mean", "mean gradient norm, nats", 1.0),
)
"""Figures of every epoch that are drawn: name in the history, label of the axis with its unit, factor."""
TESTED = (("test", "best", "robust"), ("test", "last", "robust"), ("autoattack",))
"""Where a result has the accuracies of :data:`engm.recipes.pictures.LOOKS`."""
COLUMNS = 3
WIDTH, HEIGHT = 10.5, 2.8  # inches, of the picture and of a row of panels


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws learning curves and test accuracies: see :func:`draw_into`.

    Args:
        results: from :func:`engm.recipes.runs.report.collect`.
        path: as :func:`engm.recipes.pictures.picture` takes it.

    Raises:
        OSError: the picture could not be written.
    """
    with picture(path, size_of(results)) as figure:
        draw_into(results, figure)


def size_of(results: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Width and height in inches of the picture of these results."""
    rows = rows_of(results)
    return WIDTH, max(HEIGHT, 0.35 * len(rows) + 1) * ceil((len(_panels(rows)) + 1) / COLUMNS) + 0.3


def draw_into(results: Sequence[dict[str, Any]], figure: Figure) -> None:
    """Draws a panel a figure of the epochs, and one of robust accuracy on the test set, best and last.

    Rows are those of :func:`engm.recipes.runs.report.rows_of`: a line is the mean of a row's seeds, the band one
    standard deviation to each side. Panels of figures that no run has are left out.
    """
    rows = rows_of(results)
    styles = _styles(rows)
    shown = _panels(rows)
    axes = figure.subplots(ceil((len(shown) + 1) / COLUMNS), min(COLUMNS, len(shown) + 1), squeeze=False).flatten()
    decays = {epoch for result in results for epoch in result["config"].get("decay_epochs", [])}
    for panel, (name, label, scale) in zip(axes, shown, strict=False):
        for row, style in zip(rows, styles, strict=True):
            mean_curve(panel, [found for r in row.results if (found := _curve(r, name, scale))], style, row.label)
        mark_decays(panel, decays)
        panel.set(xlabel="epoch", ylabel=label)
        if label.endswith("%"):  # a band may go on beyond what an accuracy can be
            low, high = panel.get_ylim()
            panel.set_ylim(max(low, 0.0), min(high, 100.0))
    test = axes[len(shown)]
    dots = [
        Dots(row.label, style.colour, [_spread(row.values(*path)) for path in TESTED])
        for row, style in zip(rows, styles, strict=True)
    ]
    dot_plot(test, dots)
    test.set(xlabel="robust accuracy, test set, %")
    for empty in axes[len(shown) + 1 :]:
        empty.set_axis_off()
    legend_below(figure, look_handles(dots))


def _panels(rows: Sequence[Row]) -> list[tuple[str, str, float]]:
    return [panel for panel in PANELS if any(_curve(r, panel[0], 1.0) for row in rows for r in row.results)]


def _styles(rows: Sequence[Row]) -> list[Style]:
    """A method's colour; rows of one method differ in dashes."""
    seen: dict[str, int] = {}
    found = []
    for row in rows:
        method = row.results[0]["config"]["optimizer"]
        found.append(style_of(method, seen.get(method, 0)))
        seen[method] = seen.get(method, 0) + 1
    return found


def _curve(result: Mapping[str, Any], name: str, scale: float) -> dict[int, float]:
    return {row["epoch"]: scale * float(row[name]) for row in result["history"] if row.get(name) is not None}


def _spread(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean and deviation in per cent; the deviation of one value is not a number."""
    if not values:
        return None
    return 100 * fmean(values), 100 * stdev(values) if len(values) > 1 else float("nan")
