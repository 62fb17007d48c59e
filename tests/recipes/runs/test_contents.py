"""Every command reads, or refuses with one message, the folders that the other commands write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from engm.recipes.cli import app

pytestmark = pytest.mark.slow  # the folders of four commands, with their figures

TINY = "--data digits --width 2 --epochs 1 --batch-size 32 --attack-steps 1 --evaluation-steps 2 --train-examples 64"
SMALL = [*TINY.split(), "--test-examples", "40", "--threads", "1", "--loggers", "none", "--step", "eager"]


def engm(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})


def said(*arguments: object) -> str:
    """What a command that must fail says: one message and no traceback."""
    result = engm(*arguments)
    assert result.exit_code == 1, (result.output, result.exception)
    message = " ".join(result.stderr.split())
    assert message.startswith("engm:")
    assert "Traceback" not in message
    return message


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder of each kind."""
    root = tmp_path_factory.mktemp("written")
    commands = {
        "run": ("train", *SMALL),
        "comparison": ("compare", *SMALL, "--optimizers", "msgd,engm", "--seeds", "1"),
        "reproduce": ("reproduce", "fig4", "--budget", "smoke", "--epochs", "1", "--jobs", "1"),
        "demo": ("demo", "--methods", "msgd", "--epochs", "1", "--width", "2"),
    }
    for name, command in commands.items():
        result = engm(*command, "--out", root / name)
        assert result.exit_code == 0, (name, result.output, result.exception)
    return {**{name: root / name for name in commands}, "analysis": root / "reproduce" / "fig4"}


def test_report_reads_whatever_holds_runs(written: dict[str, Path], tmp_path: Path) -> None:
    for name, methods in (("run", 1), ("comparison", 2), ("reproduce", 2), ("analysis", 2)):
        page = tmp_path / f"{name}.html"
        result = engm("report", written[name], "--html", page)
        pictures = 2 if name in ("reproduce", "analysis") else 1
        assert page.read_text(encoding="utf-8").count("<svg") == pictures
        assert result.exit_code == 0, (name, result.output, result.exception)
        rows = [line for line in result.output.splitlines() if line.split()[:1] in (["ENGM"], ["MSGD"])]
        assert len(rows) == methods, result.output
        assert "Not finished" not in result.output
    assert "holds a demonstration by engm demo" in said("report", written["demo"])


def test_commands_for_one_run_say_what_else_a_folder_holds(written: dict[str, Path], tmp_path: Path) -> None:
    expected = {
        "comparison": "holds 2 runs: ",
        "reproduce": "holds 2 runs: ",
        "analysis": "holds an analysis by engm reproduce",
        "demo": "holds a demonstration by engm demo",
    }
    for name, what in expected.items():
        for command in (
            ("evaluate", written[name]),
            ("export", written[name], "--out", tmp_path / "net.pt"),
            ("train", *SMALL, "--out", written[name]),
        ):
            message = said(*command)
            assert what in message, (command, message)
            assert str(written[name]) in message
    assert "does not exist" in said("evaluate", tmp_path / "nothing")


def test_a_run_is_not_written_over_by_commands_for_several(written: dict[str, Path]) -> None:
    before = (written["run"] / "results.json").read_bytes()
    for command in (("compare", *SMALL), ("reproduce", "fig4", "--budget", "smoke"), ("demo",)):
        assert "holds a run, and cannot hold others as well" in said(*command, "--out", written["run"])
    assert (written["run"] / "results.json").read_bytes() == before


def test_doctor_takes_any_folder(written: dict[str, Path]) -> None:
    for path in written.values():
        assert engm("doctor", "--out", path).exit_code == 0


def test_of_runs_that_differ_in_kept_weights_alone_one_is_reported(written: dict[str, Path], tmp_path: Path) -> None:
    for name, kept in (("a", []), ("b", [1])):
        folder = tmp_path / name
        folder.mkdir()
        results = json.loads((written["run"] / "results.json").read_text())
        results["config"]["keep_epochs"] = kept
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "config.toml").write_bytes((written["run"] / "config.toml").read_bytes())
    assert engm("report", tmp_path).exit_code == 0
    message = said("report", tmp_path / "a", tmp_path / "b")
    assert f"{tmp_path / 'a'} and {tmp_path / 'b'} are runs of ENGM" in message
