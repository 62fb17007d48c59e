"""Pictures of results: how they are written (PNG, SVG, PDF), and the marks, colours and legends that they share.

A method has one colour, marker and dash in every picture. The colours are those of Okabe and Ito (2008), which people
with any kind of colour blindness tell apart, and one of Paul Tol's; markers and dashes tell methods apart in grey.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from statistics import fmean, stdev
from textwrap import fill
from typing import IO, TYPE_CHECKING, Any
from zlib import crc32

from .storage.atomic_files import replaced_when_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
DPI = 160
# Fonts in a PDF are TrueType, since journals refuse Type 3. Text of an SVG is outlines, which look alike in every
# browser; ids in it follow from the drawing, so that the same results make the same file.
_LOOK: Any = {
    "pdf.fonttype": 42,
    "svg.hashsalt": "engm",
    "font.size": 9,
    "axes.titlesize": "medium",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "errorbar.capsize": 3,
}


@contextmanager
def picture(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """An empty figure to draw into, which is written when the context ends without an exception.

    Args:
        path: file to write; as everywhere in matplotlib its ending says in which format, ``.png``, ``.svg`` or
            ``.pdf``. Without one of these all three are written, beside each other. Files that exist are replaced.
        size: width and height in inches.

    Raises:
        OSError: a file could not be written; what was there before is there still.
    """
    with _figure(size) as figure:
        yield figure
        _lay_out(figure)
        for target in files_of(path):
            with replaced_when_whole(target) as temporary:
                _save(figure, temporary, target.suffix[1:])


@contextmanager
def inline_svg(size: tuple[float, float], into: list[str]) -> Iterator[Figure]:
    """An empty figure to draw into, whose SVG is appended to a list when the context ends without an exception.

    Args:
        size: width and height in inches.
        into: gets the text of the SVG file.
    """
    with _figure(size) as figure:
        yield figure
        _lay_out(figure)
        written = io.BytesIO()
        _save(figure, written, "svg")
        into.append(written.getvalue().decode())


def files_of(path: Path) -> list[Path]:
    """The files that :func:`picture` writes for a path."""
    if path.suffix[1:] in FORMATS:
        return [path]
    return [path.with_name(f"{path.name}.{kind}") for kind in FORMATS]


@contextmanager
def _figure(size: tuple[float, float]) -> Iterator[Figure]:
    import matplotlib  # imported here, because the command line starts faster without it
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_LOOK):
        yield Figure(figsize=size, layout="constrained")


def _lay_out(figure: Figure) -> None:
    """Gives everything its room, once for all formats; looking for it takes most of the time of a drawing."""
    figure.draw_without_rendering()  # from here on the labels of the ticks are known, so that they get room
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _save(figure: Figure, target: Path | IO[bytes], kind: str) -> None:
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    figure.savefig(target, format=kind, dpi=DPI, metadata=dates.get(kind))


# -- what tells things apart -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """How a line and its points look.

    Attributes:
        colour: a colour of matplotlib.
        marker: a marker of matplotlib.
        dash: a line style of matplotlib.
        filled: whether the markers are full.
    """

    colour: str
    marker: str
    dash: Any
    filled: bool = True

    def line(self) -> dict[str, Any]:
        """Arguments for ``plot`` and ``errorbar``."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "linestyle": self.dash,
            "markerfacecolor": self.colour if self.filled else "white",
        }


_DASHES: tuple[Any, ...] = (
    "-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2, 2, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (2, 2)),
)  # fmt: skip
_METHODS = {
    "engm": ("#D55E00", "o"),
    "msgd": ("#0072B2", "s"),
    "a-engm": ("#E69F00", "^"),
    "n-engm": ("#009E73", "D"),
    "f-engm": ("#CC79A7", "v"),
    "sngm": ("#56B4E9", "P"),
    "mgnc": ("#882255", "X"),
}
_OTHER_METHODS = (("#555555", "<"), ("#888888", ">"), ("#AAAAAA", "h"))  # a method of the user's own, by its name
_KINDS = (("#000000", "o"), ("#8A8A8A", "s"), ("#B8B8B8", "^"), ("#5A5A5A", "D"))


def style_of(method: str, variant: int = 0) -> Style:
    """The style of a method, the same in every picture.

    Args:
        method: name of the optimizer, as in :data:`engm.recipes.methods.LABELS`.
        variant: number of the setting, where a picture shows a method with several: other dashes, empty markers.
    """
    names = list(_METHODS)
    if method in _METHODS:
        (colour, marker), place = _METHODS[method], names.index(method)
    else:
        place = crc32(method.encode()) % len(_OTHER_METHODS)
        colour, marker = _OTHER_METHODS[place]
    return Style(colour, marker, _DASHES[(place + variant) % len(_DASHES)], filled=variant == 0)


def kind_style(index: int) -> Style:
    """The style of one of a few things that are no methods: greys, so that no method is taken for it."""
    colour, marker = _KINDS[index % len(_KINDS)]
    return Style(colour, marker, _DASHES[index % len(_DASHES)], filled=index % 2 == 0)


# -- what pictures share -----------------------------------------------------------------------------------------------


def mean_curve(axes: Axes, curves: Sequence[Mapping[int, float]], style: Style, label: str | None) -> None:
    """Draws the mean of several runs, with a band of one standard deviation to each side where there are several.

    Args:
        axes: where to draw.
        curves: values of every run by epoch; shown are the epochs that all of them have.
        style: colour and dash of the line.
        label: name in the legend; none for a curve that another panel names.
    """
    epochs = sorted(set.intersection(*map(set, curves))) if curves else []
    if not epochs:
        return
    values = [[float(curve[epoch]) for curve in curves] for epoch in epochs]
    means = [fmean(v) if all(map(isfinite, v)) else nan for v in values]
    from matplotlib.ticker import MaxNLocator  # imported here, as in _figure

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # About six markers a line tell lines apart in grey; those of other lines of the picture lie elsewhere.
    between = max(1, len(epochs) // 6)
    axes.plot(epochs, means, **style.line(), markevery=(len(axes.lines) % between, between), label=label)
    if len(curves) > 1:
        spread = [stdev(v) if isfinite(m) else nan for v, m in zip(values, means, strict=True)]
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(epochs, low, high, color=style.colour, alpha=0.18, linewidth=0)


@dataclass(frozen=True)
class Dots:
    """A line of a dot plot: what one row came to.

    Attributes:
        label: name of the row.
        colour: colour of its dots.
        values: mean and deviation (NaN of one run) of each look; ``None`` of one that was not taken.
    """

    label: str
    colour: str
    values: Sequence[tuple[float, float] | None]


@dataclass(frozen=True)
class Look:
    """What a dot of every row of a dot plot stands for.

    Attributes:
        name: as the legend has it.
        marker: a marker of matplotlib.
        full: whether the marker is filled.
        colour: a colour of its own, in place of the rows'.
    """

    name: str
    marker: str
    full: bool
    colour: str | None = None


LOOKS = (
    Look("PGD, best", "o", full=True),
    Look("PGD, last", "o", full=False),
    Look("AutoAttack, best", "D", full=True),
)
"""The robust accuracies of a table of accuracies."""


def dot_plot(
    axes: Axes, rows: Sequence[Dots], *, names: bool = True, looks: Sequence[Look] = LOOKS, joined: bool = False
) -> None:
    """Draws one line a row, from the top, with a dot and its deviation for each look.

    Args:
        axes: where to draw.
        rows: from the top.
        names: whether the rows' names stand beside them.
        looks: what the values of the rows are.
        joined: draw the dots of a row at one height, with a line from the first to the last.
    """
    shown = _looks_of(rows)
    for place, row in enumerate(rows):
        there = [value[0] for value in row.values if value is not None]
        if joined and len(there) > 1:
            axes.plot([there[0], there[-1]], [place, place], color="#BBBBBB", linewidth=2, zorder=1)
        for number, value in enumerate(row.values):
            if value is None:
                continue
            mean, deviation = value
            look = looks[number]
            colour = look.colour or row.colour
            axes.errorbar(
                mean,
                place if joined else place + 0.22 * (shown.index(number) - (len(shown) - 1) / 2),
                xerr=deviation if isfinite(deviation) else None,
                color=colour,
                marker=look.marker,
                markerfacecolor=colour if look.full else "white",
                markersize=5,
                linewidth=1,
                capsize=2,
            )
    axes.set_yticks(range(len(rows)), [fill(row.label, 20) if names else "" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def look_handles(rows: Sequence[Dots], looks: Sequence[Look] = LOOKS) -> list[Any]:
    """What a legend says of the dots that are there: grey ones, where their colours are the rows'."""
    from matplotlib.lines import Line2D

    handles = []
    for look in (looks[number] for number in _looks_of(rows)):
        colour = look.colour or "#444444"
        face = colour if look.full else "white"
        handles.append(
            Line2D([], [], color=colour, linestyle="", marker=look.marker, markerfacecolor=face, label=look.name)
        )
    return handles


def _looks_of(rows: Sequence[Dots]) -> list[int]:
    """The places among the looks of those that some row has."""
    return sorted({number for row in rows for number, value in enumerate(row.values) if value is not None})


def mark_decays(axes: Axes, epochs: Iterable[int]) -> None:
    """Dotted vertical lines after epochs at whose ends the learning rate is divided, but for the last one drawn."""
    last = axes.dataLim.x1
    for epoch in sorted(epoch for epoch in epochs if epoch < last):
        axes.axvline(epoch + 0.5, color="grey", linestyle=":", linewidth=1, label="learning rate divided")


def legend_below(figure: Figure, more: Sequence[Any] = ()) -> None:
    """One legend of all panels, below them, each name once; none where nothing has a name.

    Args:
        figure: the picture.
        more: handles that no panel has.
    """
    named: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    for handle in more:
        named.setdefault(handle.get_label(), handle)
    if not named:
        return
    width = max(map(len, named)) + 8  # of a column, in letters, of which about eleven go on an inch
    columns = max(1, min(len(named), int(11 * figure.get_figwidth() / width)))
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=columns, handlelength=3)
