"""The page of every number: nothing of the paper is missing, nothing is measured that no result holds."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest

from engm.recipes.config import RunConfig
from engm.recipes.reproduce import ANALYSES, Request, analysis, budget
from engm.recipes.reproduce.numbers import FIGURES, NOT_RUN, PRINTED_SETUP, numbers_page, results_of
from engm.recipes.reproduce.page import documents
from engm.recipes.reproduce.published import TABLE1_SECONDS, TABLE2, TABLE3, TABLE4, TABLE5

from .test_results_page import RESULTS

FOUND = documents(RESULTS)


def sections(found: dict[str, Any]) -> dict[str, str]:
    parts = re.split(r"^## (.*)$", numbers_page(found, "Title", "Introduction."), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def lines(section: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:1] == "|"][2:]


def test_every_printed_number_is_there() -> None:
    tables = [lines(text) for text in sections(FOUND).values()]
    times, optimizers, methods, _, systems, radii, *_ = tables
    assert [line[1] for line in times] == [f"{seconds:.2f}" for seconds in TABLE1_SECONDS.values()]
    for table, rows, columns in (
        (optimizers, TABLE2.values(), ("natural", "best", "last", "autoattack", "overfit")),
        (methods, TABLE3.values(), ("natural", "best", "autoattack", "overfit")),
    ):
        assert len(table) == len(rows)
        for line, row in zip(table, rows, strict=True):
            printed = [float(cell.split(" · ")[0]) for cell in line[1 : 1 + len(columns)]]
            assert printed == [getattr(row, name) for name in columns]
    for line, row in zip(systems, TABLE4.values(), strict=True):
        assert [float(cell) for cell in line[1:3]] == [row.natural, row.autoattack]
    for place, line in enumerate(radii):
        assert [float(cell.split(" · ")[0]) for cell in line[1:7]] == [row[place] for row in TABLE5.values()]


def test_every_command_computes_what_it_stands_beside() -> None:
    commands = {
        cell for text in sections(FOUND).values() for line in lines(text) for cell in line if "engm rep" in cell
    }
    assert len(commands) > 40
    for command in commands:
        name, _, chosen, *rows = shlex.split(command.strip("`"))[2:]
        asked = Request(budget(chosen), {}, (0,), rows=rows[1:])
        assert len(analysis(name).wanted(asked)) >= 1
        assert not rows or len(analysis(name).wanted(asked)) == 1


def test_every_name_is_on_the_page() -> None:
    text = numbers_page(FOUND, "Title", "Introduction.")
    for name in ANALYSES:
        assert f"engm reproduce {name}" in text
    assert FIGURES.keys() == {name for name in ANALYSES if name.startswith("fig") and name != "fig5"}


def test_measured_numbers_are_those_of_the_results() -> None:
    nothing = sections({})
    for heading in ("Table 2: optimizers", "Table 4: robust systems on WRN-34-10", "Figures"):
        assert all(NOT_RUN in line for line in lines(nothing[heading]))
    (engm,) = [line for line in lines(sections(FOUND)["Table 2: optimizers"]) if line[0] == "ENGM"]
    runs = [r for r in FOUND["table2"]["records"] if r["labels"]["optimizer"] == "engm"]
    best = [100 * r["test"]["best"]["robust"] for r in runs]
    assert engm[2].startswith(f"53.04 · {sum(best) / len(best):.1f} ± ")
    assert engm[6] == f"small, {len(runs)} runs"


@pytest.mark.parametrize(("name", "holder"), [("fig5b", "fig5a"), ("fig5h", "table2"), ("fig1", None), ("fig5d", None)])
def test_panels_of_one_setting_share_their_results(name: str, holder: str | None) -> None:
    found = results_of(name, FOUND)
    assert (found and found["analysis"]) == holder


def test_defaults_are_what_the_paper_prints() -> None:
    default = RunConfig(data="cifar10").resolved()
    for setting, (_, printed) in PRINTED_SETUP.items():
        assert getattr(default, setting) == printed
