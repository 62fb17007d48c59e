"""``engm reproduce`` as a user types it, and what it says before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from engm.recipes.cli import app
from engm.recipes.reproduce import analysis
from engm.recipes.reproduce.expense import duration
from engm.recipes.reproduce.timing import expense_of

from .conftest import request


def engm(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.mark.slow
def test_plan_then_run_then_nothing(tmp_path: Path) -> None:
    command = ("reproduce", "fig4", "--budget", "smoke", "--out", tmp_path, "--epochs", 1, "--jobs", 1)
    planned = engm(*command, "--plan")
    assert planned.exit_code == 0, planned.output
    assert "2 cells, 2 still to train, 1 at a time: about" in planned.output
    assert not (tmp_path / "runs").exists()
    done = engm(*command)
    assert done.exit_code == 0, done.output
    assert "| MSGD |" in done.output
    assert (tmp_path / "fig4" / "picture.png").is_file()
    assert "2 cells, 0 still to train" in engm(*command, "--plan").output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tabel2",), "did you mean table2"),
        (("table2", "--budget", "smal"), "did you mean small"),
        (("table2", "--seeds", "0"), "--seeds"),
        (("table2", "--budget", "smoke", "--optimizers", "msgd,adam"), "unknown optimizer"),
        (("table2", "--budget", "smoke", "--optimizers", "msgd,msgd"), "different methods"),
        (("table5", "--budget", "smoke", "--eps", "0.1"), "--eps is what this analysis varies"),
        (("table2", "--budget", "smoke", "--lr", "0"), "--lr must be positive"),
        (
            ("table4", "--budget", "smoke", "--rows", "awp-engn"),
            "unknown row of table4 (--rows): 'awp-engn'; did you mean awp-engm",
        ),
        (("fig2", "--budget", "smoke", "--rows", "msgd"), "--rows is for tables 2, 3 and 4"),
        (("all", "--budget", "smoke", "--optimizers", "msgd"), "--optimizers is for table2 and fig5h"),
        (("table2", "--budget", "small", "--data", "nowhere.npz"), "nowhere.npz"),
    ],
)
def test_bad_input_is_one_message_and_nothing_written(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = engm("reproduce", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 1, result.output
    message = " ".join(result.stderr.split())
    assert message.startswith("engm:")
    assert said in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_all_of_it_trains_what_is_shared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: analysis(name) for name in ("table1", "fig4", "fig5h")}
    monkeypatch.setattr("engm.recipes.reproduce.ANALYSES", few)
    command = ("reproduce", "all", "--budget", "smoke", "--out", tmp_path, "--epochs", 1)
    # fig4 measures more on two of the runs, which are cells of their own.
    assert "9 cells, 9 still to train, 2 at a time" in engm(*command, "--plan", "--jobs", 2).output
    done = engm(*command)
    assert done.exit_code == 0, done.output
    for name in few:
        assert f"Table, figures, picture: {tmp_path / name}" in done.output
        assert (tmp_path / name / "picture.svg").is_file()
    trained = list((tmp_path / "runs").glob("*/checkpoints"))
    assert len(trained) == 7
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert engm(*command).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


@pytest.mark.slow
def test_a_plan_counts_what_is_left(tmp_path: Path) -> None:
    cells = analysis("table2").cells(request())
    whole = expense_of(cells, tmp_path, torch.device("cpu"), None)
    assert (whole.cells, whole.trained) == (7, 0)
    assert whole.seconds > 0
    assert whole.peak_bytes > 1e7
    assert whole.jobs >= 1
    (tmp_path / cells[0].folder_name).mkdir()
    (tmp_path / cells[0].folder_name / "results.json").write_text("{}")
    part = expense_of(cells[:1], tmp_path, torch.device("cpu"), 3)
    assert (part.trained, part.jobs) == (1, 3)
    assert part.seconds < whole.seconds


def test_durations_are_for_people() -> None:
    assert [duration(s) for s in (5, 600, 7200, 864_000)] == ["5 s", "10 min", "2.0 h", "10 days"]
