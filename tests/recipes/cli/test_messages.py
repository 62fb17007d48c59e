"""What a command says to who uses it for the first time: a line for a warning or a refusal, and no promise."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from little_network import COUPLED
from typer.testing import CliRunner, Result

from engm.recipes.cli import app
from engm.recipes.cli.terminal import PACKAGE, warnings_in_a_line
from engm.recipes.spelling import parse_number, shown_radius

TINY = "--epochs 1 --batch-size 32 --attack-steps 1 --evaluation-steps 2 --threads 1 --train-examples 64"


def engm(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})


def test_a_network_whose_examples_meet_is_refused_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(COUPLED)
    result = engm("train", *TINY.split(), "--model", f"{tmp_path}/net.py:Net", "--out", tmp_path / "run")
    assert result.exit_code == 1, result.exception
    message = " ".join(result.stderr.split())
    assert message.startswith("engm: the output of layer 'head' (Linear) for some examples influences the losses")
    assert message.count("engm:") == 1
    assert "add --coupled exact, which takes" in message
    assert "GradNormModule" not in message


def test_a_refused_network_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(COUPLED)
    net = f"{tmp_path}/net.py:Net"
    assert engm("train", *TINY.split(), "--model", net, "--lr", 0.5, "--out", tmp_path / "runs/it").exit_code == 1
    assert not (tmp_path / "runs").exists()
    many = ("compare", *TINY.split(), "--model", net, "--seeds", 1, "--out", tmp_path / "runs/many", "--optimizers")
    assert engm(*many, "engm").exit_code == 1
    assert not (tmp_path / "runs").exists()
    assert engm(*many, "msgd,engm").exit_code == 1  # the first needs no norms, and is trained
    assert {path.name for path in (tmp_path / "runs/many").iterdir()} == {"comparison-plan.json", "msgd-seed0"}


def test_but_what_was_there_before(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(COUPLED)
    run = tmp_path / "run"
    (run / ".mine").mkdir(parents=True)
    command = ("train", *TINY.split(), "--model", f"{tmp_path}/net.py:Net", "--out", run)
    assert engm(*command).exit_code == 1
    assert [path.name for path in run.iterdir()] == [".mine"]
    (run / "config.toml").write_text("")  # of a run that was killed before anything was kept
    assert engm(*command).exit_code == 1
    assert {path.name for path in run.iterdir()} == {".mine", "config.toml"}
    assert (run / "config.toml").read_text() == ""


def test_and_trains_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(COUPLED)
    net = f"{tmp_path}/net.py:Net"
    result = engm("train", *TINY.split(), "--model", net, "--coupled", "exact", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "run/results.json").read_text())["config"]["coupled"] == "exact"


def test_version_without_torch() -> None:
    code = (
        "import sys; from engm.recipes.cli import app\n"
        "try: app(['--version'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == f"engm {version('engm')}, torch {version('torch')}, Python {platform.python_version()}\n"


def test_a_refused_run_does_not_say_that_it_begins(tmp_path: Path) -> None:
    result = engm("train", *TINY.split(), "--data", tmp_path / "none.npz", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "no data file" in result.stderr
    assert result.stdout == ""


def test_one_class_is_nothing_to_learn(tmp_path: Path) -> None:
    images, labels = np.zeros((40, 8, 8, 1), np.uint8), np.zeros(40, int)
    np.savez(tmp_path / "one.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    command = ("train", *TINY.split()[:-2], "--data", tmp_path / "one.npz", "--validation-examples", 8)
    result = engm(*command, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "has one class alone, so that there is nothing to learn" in " ".join(result.stderr.split())


def test_a_name_that_is_neither_data_nor_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = engm("train", *TINY.split(), "--data", "images", "--out", "run")
    assert f"unknown data set, and neither a file nor a folder in {tmp_path}: 'images'" in " ".join(
        result.stderr.split()
    )


def test_a_warning_is_one_line() -> None:
    with warnings_in_a_line():
        ours, theirs = (
            warnings.formatwarning("of two\nlines", UserWarning, str(file), 7)
            for file in (PACKAGE / "rules" / "base.py", Path("/home/me/net.py"))
        )
    assert ours == "engm: warning: of two lines\n"
    assert theirs == "engm: warning: of two lines (UserWarning at /home/me/net.py:7)\n"
    assert warnings.formatwarning("back", UserWarning, "x.py", 1).startswith("x.py:1")


def test_warnings_of_commands_are_such_lines_and_can_still_be_caught(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text("import warnings\ndef none():\n    warnings.warn('look')\n    return []\n")
    data = ["--data", f"{tmp_path}/data.py:none", "--out", f"{tmp_path}/run"]
    ran = subprocess.run([sys.executable, "-m", "engm.recipes", "train", *data], capture_output=True, text=True)
    assert f"engm: warning: look (UserWarning at {tmp_path}/data.py:3)\n" in ran.stderr
    assert "warnings.warn(" not in ran.stderr
    with pytest.warns(UserWarning, match="look"):
        engm("train", *data)


@pytest.mark.parametrize(("typed", "shown"), [("8/255", "8/255"), ("128/255", "128/255"), ("0.1", "0.1"), ("0", "0")])
def test_a_radius_is_shown_as_it_is_typed(typed: str, shown: str) -> None:
    assert shown_radius(parse_number(typed)) == shown
