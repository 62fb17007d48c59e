"""Every figure and table at the smallest budget: files, repeatability, resuming, several cells at once."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from engm.checks import NonFiniteError
from engm.recipes.reproduce import ANALYSES, analysis
from engm.recipes.reproduce.outcome import save_picture
from engm.recipes.reproduce.page import documents, draw_pictures, outcome_of, page
from engm.recipes.storage.atomic_files import read_json

from ..conftest import draw_roughly
from .conftest import Carry, request

FILES = {"config.toml", "results.json", "table.csv", "table.md", "picture.png", "picture.svg", "picture.pdf"}
TIMES = ("seconds", "step_seconds", "machine")


@pytest.fixture(autouse=True)
def rough_pictures() -> None:
    """None here: pictures are what is looked at."""


def figures(path: Path) -> object:
    """Everything in ``results.json`` but times."""
    document = read_json(path / "results.json")
    records = [{k: v for k, v in record.items() if k not in TIMES} for record in document["records"]]
    return [document["analysis"], records]


@pytest.mark.slow
@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_runs_and_writes_its_files(name: str, out: Path, tmp_path: Path, carried: Carry) -> None:
    outcome = carried(name, out)
    folder = out / name
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    document = read_json(folder / "results.json")
    assert document["budget"] == "smoke"
    assert len(document["records"]) == len(analysis(name).cells(request()))
    assert not any("diverged" in record for record in document["records"])
    with (folder / "table.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(outcome.rows) > 0
    text = (folder / "table.md").read_text()
    assert f"engm reproduce {name} --budget smoke" in text
    # The page is made from the file: what was rounded or stringified on the way would show.
    assert outcome_of(json.loads((folder / "results.json").read_text())).markdown() == outcome.markdown()
    for finding in outcome.findings:  # one seed has no interval
        assert finding.verdict == "cannot say" or name == "table1"
    if name != "table1":
        check_divergence(name, document["records"], tmp_path / "picture.png")


def check_divergence(name: str, records: list[dict], picture: Path) -> None:
    """With any kind of run lost, the others are shown."""
    for lost in {0, 1, len(records) - 1}:
        told = {key: records[lost][key] for key in ("name", "labels", "folder")}
        some = [*records[:lost], {**told, "diverged": "at step 3"}, *records[lost + 1 :]]
        outcome = analysis(name).summarise(some)
        assert "nan" not in outcome.markdown()
        with pytest.MonkeyPatch.context() as patch:
            draw_roughly(patch)
            save_picture(outcome, picture)


def test_rows_in_l2_are_attacked_in_l2(tmp_path: Path, carried: Carry) -> None:
    outcome = carried("table3-l2", tmp_path, asked=request(rows=("digits-mart-engm",)))
    (record,) = read_json(tmp_path / "table3-l2" / "results.json")["records"]
    assert [row[0] for row in outcome.tables[0].rows] == ["digits, l2, MART, ENGM"]
    assert (record["config"]["objective"], record["config"]["threat"], record["config"]["eps"]) == ("mart", "l2", 1.0)
    (asked,) = read_json(tmp_path / "runs" / record["folder"] / "evaluation.json")["best"]["autoattack"]
    assert (asked["threat"], asked["eps"]) == ("l2", 1.0)
    assert record["measures"]["autoattack"] == asked["accuracy"]


def test_nothing_but_diverged_runs_is_an_error(tmp_path: Path, carried: Carry) -> None:
    with pytest.raises(NonFiniteError, match="every run of fig2 diverged"):
        carried("fig2", tmp_path, asked=request(lr=1e30))


def test_published_figures_stand_beside_the_measured(out: Path, carried: Carry) -> None:
    carried("table2", out, asked=request(optimizers=("msgd", "engm")))
    text = (out / "table2" / "table.md").read_text()
    assert "(50.87)" in text
    assert "(49.24)" in text


def test_a_repeated_analysis_computes_nothing_and_says_the_same(out: Path, carried: Carry) -> None:
    first = carried("fig2", out)
    before = figures(out / "fig2")
    stamps = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    assert carried("fig2", out).markdown() == first.markdown()
    assert figures(out / "fig2") == before
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()} == stamps


def test_an_interrupted_sweep_goes_on_and_ends_the_same(out: Path, tmp_path: Path, carried: Carry) -> None:
    def interrupt(record: object, done: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    carried("fig2", out)
    with pytest.raises(KeyboardInterrupt):
        carried("fig2", tmp_path, on_cell=interrupt)
    done = list((tmp_path / "runs").glob("*/results.json"))
    assert len(done) == 1
    assert not (tmp_path / "fig2" / "results.json").exists()
    stamp = done[0].stat().st_mtime_ns
    carried("fig2", tmp_path)
    assert done[0].stat().st_mtime_ns == stamp
    assert figures(tmp_path / "fig2") == figures(out / "fig2")  # another folder, the same figures


@pytest.mark.slow
def test_several_cells_at_once_come_to_the_same(out: Path, tmp_path: Path, carried: Carry) -> None:
    carried("fig2", out)
    counts: list[int] = []
    carried("fig2", tmp_path, jobs=2, on_cell=lambda record, done: counts.append(done))
    assert counts == [1, 2]
    assert figures(tmp_path / "fig2") == figures(out / "fig2")


def test_a_page_is_made_of_what_is_there(out: Path, tmp_path: Path, carried: Carry) -> None:
    carried("fig2", out)
    found = {name: document for name, document in documents(out).items() if name == "fig2"}
    text = page(found, "Title", "Introduction.")
    assert text.startswith("# Title\n\nIntroduction.\n\n**Agrees with the paper")
    assert "lies on that side): 0**\n\n- nothing" in text
    assert "](fig2/picture.svg)" in text
    (tmp_path / "fig2").mkdir()
    draw_pictures(found, tmp_path)
    assert (tmp_path / "fig2" / "picture.svg").is_file()
    with pytest.raises(FileNotFoundError, match="engm reproduce NAME"):
        documents(tmp_path)
