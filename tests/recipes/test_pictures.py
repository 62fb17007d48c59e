"""Pictures: the files that are written, what tells methods apart, the band over seeds, and where the legend is."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from engm.recipes.methods import LABELS
from engm.recipes.pictures import (
    FORMATS,
    Dots,
    dot_plot,
    kind_style,
    legend_below,
    look_handles,
    mean_curve,
    picture,
    style_of,
)

SIZE = (3.0, 2.0)
# Machado, Oliveira and Fernandes (2009): what people without one kind of cone see of linear RGB.
BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.fixture(autouse=True)
def rough_pictures() -> None:
    """None here: pictures are what is looked at."""


def drawn(path: Path) -> None:
    with picture(path, SIZE) as figure:
        mean_curve(figure.subplots(), [{1: 1.0, 2: 3.0}, {1: 2.0, 2: 5.0}], style_of("engm"), "ENGM")
        legend_below(figure)


@pytest.mark.parametrize("name", ["curves", "of v1.5"])
def test_without_an_ending_all_three_formats_are_written(tmp_path: Path, name: str) -> None:
    drawn(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.{kind}" for kind in FORMATS}
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    for kind, start in starts.items():
        assert (tmp_path / f"{name}.{kind}").read_bytes().startswith(start)
    assert b"/Type3" not in (tmp_path / f"{name}.pdf").read_bytes()


@pytest.mark.parametrize("kind", FORMATS)
def test_an_ending_says_the_format_and_the_same_drawing_is_the_same_file(tmp_path: Path, kind: str) -> None:
    for name in ("a", "b"):
        drawn(tmp_path / f"{name}.{kind}")
    assert len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_a_drawing_that_fails_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), picture(tmp_path / "curves", SIZE):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def lab(linear: np.ndarray) -> np.ndarray:
    """CIELAB of linear sRGB."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(np.clip(xyz, 0, None) / [0.9505, 1, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def linear(colour: str) -> np.ndarray:
    return np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)])


def test_methods_are_told_apart_by_the_colour_blind_and_in_grey() -> None:
    for one, other in combinations(LABELS, 2):
        a, b = style_of(one), style_of(other)
        for kind, matrix in BLIND.items():
            apart = lab(np.array(matrix) @ linear(a.colour)) - lab(np.array(matrix) @ linear(b.colour))
            assert np.linalg.norm(apart) > 10, (one, other, kind)
        assert a.marker != b.marker
        assert a.dash != b.dash


def test_a_method_has_one_colour_whatever_else_is_there() -> None:
    for name in (*LABELS, "my.package:Mine"):
        assert style_of(name) == style_of(name)
        several = [style_of(name, variant) for variant in range(4)]
        assert len({style.colour for style in several}) == 1
        assert len({str(style.dash) for style in several}) == 4
    kinds = {kind_style(index).colour for index in range(4)}
    assert len(kinds) == 4
    assert not kinds & {style_of(name).colour for name in LABELS}


def test_line_and_band_are_mean_and_deviation() -> None:
    axes = Figure().subplots()
    curves = [{1: 1.0, 2: 4.0, 3: 9.0}, {1: 2.0, 2: 8.0}, {1: 6.0, 2: float("nan"), 3: 1.0}]
    mean_curve(axes, curves[:2], style_of("msgd"), "MSGD")
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[1, 1.5], [2, 6.0]]
    (band,) = axes.collections
    edges = {tuple(point) for point in np.round(band.get_paths()[0].vertices, 9)}
    for epoch, values in ((1, [1.0, 2.0]), (2, [4.0, 8.0])):
        for sign in (-1, 1):
            assert (epoch, round(np.mean(values) + sign * np.std(values, ddof=1), 9)) in edges
    mean_curve(axes, curves[:1], style_of("engm"), None)
    assert len(axes.collections) == 1, "one run has no band"
    mean_curve(axes, curves, style_of("sngm"), None)
    assert np.isnan(axes.lines[-1].get_ydata()[1])
    mean_curve(axes, [], style_of("sngm"), None)
    mean_curve(axes, [{1: 1.0}, {2: 1.0}], style_of("sngm"), None)
    assert len(axes.lines) == 3


def test_the_legend_lies_on_no_panel_and_names_everything_once(tmp_path: Path) -> None:
    with picture(tmp_path / "a.svg", (9, 3)) as figure:
        rows = [Dots(name, style_of(name).colour, [(1.0, 0.1), None, (2.0, float("nan"))]) for name in LABELS]
        for axes in figure.subplots(1, 2):
            for name, label in LABELS.items():
                mean_curve(axes, [{1: 1.0, 2: 2.0}], style_of(name), label)
        dot_plot(figure.axes[1], rows)
        legend_below(figure, look_handles(rows))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*LABELS.values(), "PGD, best", "AutoAttack, best"]
    renderer = figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else None
    for axes in figure.axes:
        assert not legend.get_window_extent(renderer).overlaps(axes.get_tightbbox(renderer))


def test_no_legend_where_nothing_has_a_name(tmp_path: Path) -> None:
    with picture(tmp_path / "a.svg", SIZE) as figure:
        mean_curve(figure.subplots(), [{1: 1.0, 2: 2.0}], style_of("engm"), None)
        legend_below(figure)
    assert not figure.legends
