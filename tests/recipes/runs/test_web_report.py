"""``engm report --html``: a page that stands alone, and whose numbers are those of the files that it is made from."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev

import pytest
from made_up_runs import made_up
from typer.testing import CliRunner, Result

from engm.recipes.cli import app
from engm.recipes.reproduce.page import outcome_of

RESULTS = Path(__file__).parents[3] / "docs" / "results"
EMPTY = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """The tables, links, ids and pictures of a page; an element that is closed by another's tag is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.values: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.pictures = 0
        self.feed(self.text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open += [] if tag in EMPTY else [tag]
        self.values += [value or "" for _, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.pictures += tag == "svg"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def table(self, *headings: str) -> list[list[str]]:
        """The rows of the first table that begins with these headings."""
        return next(rows[1:] for rows in self.tables if rows[0][: len(headings)] == list(headings))

    def check(self) -> None:
        """Nothing is fetched, nothing runs, names are unique, and what is referred to is there."""
        assert not re.search(r"https?:|//\w", self.text)
        assert not {"script", "link", "img", "iframe", "image"} & self.tags
        assert len(set(self.ids)) == len(self.ids)
        targets = re.findall(r'(?:href="|url\()#([^")]+)', self.text)
        assert targets
        assert set(targets) <= set(self.ids)
        assert "prefers-color-scheme: dark" in self.text
        assert "default-src 'none'" in self.text


def report(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)], env={"COLUMNS": "160"})


def page_of(tmp_path: Path, *paths: Path) -> Page:
    result = report(*paths, "--html", tmp_path / "out" / "page.html")
    assert result.exit_code == 0, result.output
    found = Page(tmp_path / "out" / "page.html")
    found.check()
    return found


def accuracy(values: list[float]) -> str:
    """As a table has it: mean and deviation in per cent."""
    scaled = [100 * value for value in values]
    return f"{mean(scaled):.1f}" + (f" ± {stdev(scaled):.1f}" if len(scaled) > 1 else "")


@pytest.fixture(autouse=True)
def rough_pictures() -> None:
    """None here: pictures are what is looked at."""


def test_a_comparison_and_every_number_of_it(tmp_path: Path) -> None:
    entry = {"examples": 20, "eps": 0.2, "epoch": 3, "accuracy": 0.123456}
    folders = [
        made_up(tmp_path / "runs" / f"{name}-{seed}", best=best, seed=seed, optimizer=name, evaluations=[entry])
        for name, seed, best in (("msgd", 0, 0.41), ("msgd", 1, 0.48), ("engm", 0, 0.52))
    ]
    page = page_of(tmp_path, tmp_path / "runs")
    found = {folder.name: json.loads((folder / "results.json").read_text()) for folder in folders}
    rows = {row[0]: row for row in page.table("Run", "Seeds")}
    for label, names in (("MSGD", ["msgd-0", "msgd-1"]), ("ENGM", ["engm-0"])):
        tests = [found[name]["test"] for name in names]
        assert rows[label][1] == str(len(names))
        assert rows[label][2:5] == [
            accuracy([test["best"]["natural"] for test in tests]),
            accuracy([test["best"]["robust"] for test in tests]),
            accuracy([test["last"]["robust"] for test in tests]),
        ]
    assert page.table("run", "optimizer", "seed") == [
        ["engm-0", "engm", "0"],
        ["msgd-0", "msgd", "0"],
        ["msgd-1", "msgd", "1"],
    ]
    assert page.table("run", "checkpoint", "attack")[0] == [
        "engm-0",
        "best",
        "autoattack",
        "20",
        "0.2",
        "3",
        "0.123456",
    ]
    assert page.table("run", "processes") == [["all", "1"]]
    epochs = [rows[1:] for rows in page.tables if rows[0][0] == "epoch"]
    assert [float(rows[0][1]) for rows in epochs] == [0.52, 0.41, 0.48]
    assert page.pictures == 1
    assert str(tmp_path) not in page.text


def test_settings_that_were_chosen_are_seen_and_the_others_are_there(tmp_path: Path) -> None:
    made_up(tmp_path / "run", beta=4.5, data_root="/somewhere/secret")
    page = page_of(tmp_path, tmp_path / "run")
    chosen, others = [dict(rows[1:]) for rows in page.tables if rows[0] == ["setting", "value"]]
    assert chosen["--beta"] == "4.5"
    assert chosen["--optimizer"] == "engm"
    assert others["--momentum"] == "0.9"
    assert not chosen.keys() & others.keys()
    assert "secret" not in page.text


@pytest.mark.parametrize("name", ["table2", "table5", "fig4"])
def test_an_analysis_whose_runs_were_not_kept(tmp_path: Path, name: str) -> None:
    shutil.copytree(RESULTS / name, tmp_path / name)
    page = page_of(tmp_path, tmp_path / name)
    document = json.loads((RESULTS / name / "results.json").read_text(encoding="utf-8"))
    outcome = outcome_of(document)
    for table in outcome.tables:
        assert page.table(*table.headings) == [list(row) for row in table.rows]
    assert [row[2] for row in page.table("the paper", "measured")] == [f.verdict for f in outcome.findings]
    every = page.table(*outcome.rows[0])
    for shown, row in zip(every, outcome.rows, strict=True):
        for cell, value in zip(shown, row.values(), strict=True):
            if isinstance(value, float):
                assert float(cell) == pytest.approx(value, rel=1e-5)
            else:
                assert cell == ("" if value is None else str(value))
    message = report(tmp_path / name, "--html", tmp_path / "x.html", "--out", tmp_path / "table")
    assert message.exit_code == 1
    assert "--out cannot make a table of runs" in " ".join(message.stderr.split())
    assert not (tmp_path / "table").exists()


def test_figures_of_table_2_are_those_of_its_records(tmp_path: Path) -> None:
    shutil.copytree(RESULTS / "table2", tmp_path / "table2")
    records = json.loads((RESULTS / "table2" / "results.json").read_text(encoding="utf-8"))["records"]
    rows = {row[0]: row for row in page_of(tmp_path, tmp_path / "table2").table("optimizer")}
    for optimizer, label in (("msgd", "MSGD"), ("engm", "ENGM")):
        mine = [record["test"] for record in records if record["labels"]["optimizer"] == optimizer]
        for column, value in ((1, "natural"), (2, "robust")):
            assert rows[label][column].startswith(accuracy([test["best"][value] for test in mine]))


def test_a_folder_of_analyses_and_runs(tmp_path: Path) -> None:
    for name in ("table2", "fig5a"):
        shutil.copytree(RESULTS / name, tmp_path / name)
    made_up(tmp_path / "runs" / "a", seed=0)
    page = page_of(tmp_path, tmp_path)
    assert page.pictures == 3
    for title in ("(Table 2, Fig. 5h)", "α alone (Fig. 5)", "Runs"):
        assert page.text.count(title) >= 2, "a heading and a link to it"
    assert page.table("Run", "Seeds")[0][0] == "ENGM"


def test_a_name_is_text_and_no_markup(tmp_path: Path) -> None:
    made_up(tmp_path / "runs" / "<b>&amp;", seed=0)
    page = page_of(tmp_path, tmp_path / "runs")
    assert "&lt;b&gt;&amp;amp;" in page.text


def test_a_folder_in_the_place_of_the_file_is_one_message(tmp_path: Path) -> None:
    made_up(tmp_path / "run")
    result = report(tmp_path / "run", "--html", tmp_path)
    assert result.exit_code == 1
    assert "has to name the file to write" in " ".join(result.stderr.split())


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_the_page_and_has_nothing_to_complain_of(tmp_path: Path) -> None:
    shutil.copytree(RESULTS / "table2", tmp_path / "table2")
    page_of(tmp_path, tmp_path / "table2")
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    page = tmp_path / "out" / "page.html"
    found = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, check=True, timeout=60)
    assert "CONSOLE" not in found.stderr
    (tmp_path / "seen.html").write_text(found.stdout, encoding="utf-8")
    seen = Page(tmp_path / "seen.html")
    seen.check()
    assert seen.tables == Page(page).tables
