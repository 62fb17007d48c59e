"""The pictures of tables: ours and the paper's at one scale, and a method's colour wherever it is drawn."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from made_up_runs import made_up
from matplotlib.figure import Figure

from engm.recipes.methods import LABELS
from engm.recipes.pictures import style_of
from engm.recipes.reproduce import analysis
from engm.recipes.reproduce.method_tables import METHODS
from engm.recipes.reproduce.page import documents
from engm.recipes.reproduce.published import TABLE1_SECONDS, TABLE2, TABLE3, TABLE4, TABLE5
from engm.recipes.runs.curves import draw_into
from engm.recipes.runs.report import collect

RESULTS = Path(__file__).parents[3] / "docs" / "results"


def records_of(name: str) -> list[dict[str, Any]]:
    return documents(RESULTS)[name]["records"]


def drawn(name: str, records: list[dict[str, Any]]) -> Figure:
    figure = Figure(layout="constrained")
    analysis(name).summarise(records).draw(figure)
    return figure


def points(axes: Any) -> set[tuple[float, str]]:
    """Where the dots of a dot plot lie, and their colours."""
    return {
        (round(float(line.get_xdata()[0]), 6), line.get_color()) for line in axes.lines if line.get_marker() in "oD"
    }


@pytest.fixture(autouse=True)
def rough_pictures() -> None:
    """None here: pictures are what is looked at."""


def test_table_2_has_the_papers_dots_beside_ours_at_one_scale() -> None:
    records = records_of("table2")
    curves, ours, paper = drawn("table2", records).axes
    assert ours.get_xlim() == paper.get_xlim()
    assert ours.get_ylim() == paper.get_ylim()
    shown = {record["labels"]["optimizer"] for record in records}
    for optimizer in shown:
        colour, row = style_of(optimizer).colour, TABLE2[optimizer]
        assert {(row.best, colour), (row.last, colour), (row.autoattack, colour)} <= points(paper)
        best = [record["test"]["best"]["robust"] for record in records if record["labels"]["optimizer"] == optimizer]
        assert (round(100 * fmean(best), 6), colour) in points(ours)
    lines = {line.get_label(): line for line in curves.lines}
    for optimizer in shown:
        line = lines[LABELS[optimizer]]
        assert line.get_color() == style_of(optimizer).colour
        last = [r["history"][-1]["robust"] for r in records if r["labels"]["optimizer"] == optimizer]
        assert line.get_ydata()[-1] == pytest.approx(100 * fmean(last))
    assert len(curves.collections) == len(shown), "a band each"


def test_table_5_has_the_papers_curves_below_ours_at_one_scale() -> None:
    axes = np.array(drawn("table5", records_of("table5")).axes).reshape(2, 3)
    for column, (ours, paper) in enumerate(axes.T):
        assert ours.get_ylim() == paper.get_ylim()
        assert list(paper.lines[0].get_ydata()) == [row[column] for row in TABLE5.values()]
    assert [len(paper.lines) for paper in axes[1]] == [1, 1, 2]


def test_table_1_has_the_papers_bars_beside_ours_at_one_scale() -> None:
    ways = [("msgd", "own pass"), ("engm", "borrowed"), ("engm", "own pass")]
    seconds = {f"{name}, {way}": [0.2 if name == "engm" else 0.1] * 3 for name, way in ways}
    config = {"model": "vgg8", "attack_steps": 2, "batch_size": 8, "calibrate_every": 50, "tau": 50}
    ours, paper = drawn("table1", [{"labels": {}, "config": config, "seconds_per_step": seconds}]).axes
    assert ours.get_xlim() == paper.get_xlim()
    assert [bar.get_width() for bar in ours.patches] == [1, 2, 2]
    assert [bar.get_width() for bar in paper.patches] == [1, TABLE1_SECONDS["engm"] / TABLE1_SECONDS["msgd"]]


def run(method: str, optimizer: str, natural: float, robust: float) -> dict[str, Any]:
    """A record of a run that nobody trained."""
    looks = {"natural": natural, "robust": robust}
    return {
        "labels": {"data": "cifar10", "threat": "linf", "method": method, "optimizer": optimizer, "seed": 0},
        "config": {"model": "wrn-10-1"},
        "data": {"name": "cifar10", "test": 100},
        "test": {"best": looks, "last": looks},
        "overfit": 0.1,
        "measures": {"autoattack": robust},
        "measured_on": {"autoattack": None},
        "history": [],
    }


def test_table_4_has_every_row_and_never_mixes_quoted_and_measured() -> None:
    records = [run("awp", "engm", 0.81, 0.41), run("fat", "msgd", 0.72, 0.32)]
    outcome = analysis("table4").summarise(records)
    (table,) = outcome.tables
    assert len(table.rows) == len(TABLE4)
    for row, printed in zip(table.rows, TABLE4.values(), strict=True):
        assert row[2:4] == [f"{printed.natural:.2f}", f"{printed.autoattack:.2f}"]
    assert [row[4:6] for row in table.rows if row[6] == "1"] == [["72.0", "32.0"], ["81.0", "41.0"]]
    assert sum(row[4:6] == ["not run", "not run"] for row in table.rows) == len(TABLE4) - 2
    ours, paper = drawn("table4", records).axes
    assert ours.get_xlim() == paper.get_xlim()
    assert len(points(ours)) == 4
    assert {x for x, _ in points(paper)} == {
        value for row in TABLE4.values() for value in (row.natural, row.autoattack)
    }
    assert [text.get_text() for text in ours.texts] == ["not run"] * (len(TABLE4) - 2)


def test_figure_1_has_the_papers_dots_below_ours_at_one_scale() -> None:
    records = [run(m, o, 0.8, 0.4 if o == "msgd" else 0.5) for m in METHODS for o in ("msgd", "engm")]
    axes = np.array(drawn("fig1", records).axes).reshape(2, 2)
    for (ours, paper), name in zip(axes.T, ("autoattack", "overfit"), strict=True):
        assert ours.get_xlim() == paper.get_xlim()
        dots = {round(float(line.get_xdata()[0]), 6) for line in paper.lines if line.get_marker() in "os"}
        assert dots == {getattr(TABLE3["cifar10", m, o], name) for m in METHODS for o in ("msgd", "engm")}
    assert {round(float(line.get_xdata()[0]), 6) for line in axes[0, 0].lines if line.get_marker() in "os"} == {40, 50}


def test_figure_5h_shows_the_second_half_of_every_curve() -> None:
    (axes,) = drawn("fig5h", records_of("table2")).axes
    curves = [line for line in axes.lines if line.get_label() in LABELS.values()]
    assert len(curves) == 4
    assert all(min(line.get_xdata()) >= 15 and max(line.get_xdata()) == 30 for line in curves)


@pytest.mark.parametrize("name", ["fig2", "fig3", "fig4", "fig5a"])
def test_every_panel_says_what_is_on_its_axes_and_no_legend_lies_on_one(name: str) -> None:
    figure = drawn(name, records_of(name))
    figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.axison and axes.get_label() != "<colorbar>"]
    for axes in panels:
        place = axes.get_subplotspec()
        assert axes.get_xlabel() or not place.is_last_row()
        assert axes.get_ylabel() or not place.is_first_col()
        assert axes.get_legend() is None
    assert len(figure.legends) == (name != "fig4")


def test_rows_of_a_report_keep_their_colours_whoever_else_is_there(tmp_path: Path) -> None:
    for name in ("msgd", "engm", "a-engm"):
        for seed, best in ((0, 0.3), (1, 0.5)):
            made_up(tmp_path / name / str(seed), optimizer=name, seed=seed, best=best)
    made_up(tmp_path / "other" / "0", optimizer="engm", seed=0, eps=0.1)
    for chosen in (["msgd", "engm", "a-engm"], ["a-engm"], ["engm", "other"]):
        results, _ = collect([tmp_path / name for name in chosen])
        figure = Figure(layout="constrained")
        draw_into(results, figure)
        robust = figure.axes[0]
        lines = {line.get_label().split(",")[0].lower(): line for line in robust.lines}
        colours = [line.get_color() for label, line in lines.items() if label in LABELS]
        assert colours == [style_of(label).colour for label in lines if label in LABELS]
        assert len(colours) == len({"engm" if name == "other" else name for name in chosen})
    mine = [line for line in robust.lines if line.get_label().startswith("ENGM, eps")]
    assert len({line.get_color() for line in mine}) == 1
    assert len({line.get_markerfacecolor() for line in mine}) == 2
    (band,) = list(robust.collections)  # of two seeds; the other setting has one
    edges = band.get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == pytest.approx((40 - 100 * stdev([0.3, 0.5]), 40 + 100 * stdev([0.3, 0.5])))
