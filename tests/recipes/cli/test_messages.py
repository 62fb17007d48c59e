"""What a command says to who uses it for the first time: a line for a warning or a refusal, and no promise."""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from little_network import COUPLED
from typer.testing import CliRunner, Result

from engm.recipes.cli import app
from engm.recipes.cli.terminal import PACKAGE, warnings_in_a_line
from engm.recipes.runs.folder import RunFolder
from engm.recipes.spelling import parse_number, shown_radius

TINY = "--epochs 1 --step eager --batch-size 32 --attack-steps 1 --evaluation-steps 2 --threads 1 --train-examples 64"
RECORDED = TINY.replace("eager", "auto")
LONGER = TINY.replace("--epochs 1", "--epochs 12")


def engm(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})


def test_a_network_whose_examples_meet_is_refused_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(COUPLED)
    result = engm("train", *RECORDED.split(), "--model", f"{tmp_path}/net.py:Net", "--out", tmp_path / "run")
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


FAILING = """
import sys
import torch
from torch import nn
from sklearn.datasets import load_digits
import engm
from engm.adversarial import cross_entropy
calls = {}

def count(name, last):
    calls[name] = calls.get(name, 0) + 1
    if calls[name] > last:
        raise KeyError(f"{name} is tired")

def tired(model, x, x_adv, y):
    count("objective", 10)
    return cross_entropy(model(x_adv), y)

def leaves(model, x, x_adv, y):
    calls["leaves"] = calls.get("leaves", 0) + 1
    if calls["leaves"] > 10:
        sys.exit()
    return cross_entropy(model(x_adv), y)

def mistaken(model, x, x_adv, y):
    calls["mistaken"] = calls.get("mistaken", 0) + 1
    return cross_entropy(model(x_adv), y[: len(y) - calls["mistaken"] // 4])

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        count("network", 30)
        return self.head(x.flatten(1))

class Soft(engm.ExampleOptimizer):
    uses_norms = True

    def weights(self, norms):
        count("optimizer", 3)
        return engm.optim.Weighting(torch.ones_like(norms.of_gradients), norms.of_gradients)

class Items:
    def __init__(self, rows):
        images, labels = load_digits(return_X_y=True)
        self.x, self.targets = torch.from_numpy(images[rows] / 16).float().view(-1, 1, 8, 8), labels[rows]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        if row == 5:
            raise KeyError("a row is tired")
        return self.x[row], int(self.targets[row])

def digits():
    return Items(slice(0, 1200)), Items(slice(1200, None))
"""


@pytest.mark.parametrize(
    ("options", "function", "why"),
    [
        ("--objective own.py:tired", "count", "KeyError: 'objective is tired'"),
        ("--objective own.py:leaves", "leaves", "SystemExit: "),
        ("--objective own.py:mistaken", "mistaken", "ValueError: Expected input batch_size"),
        ("--model own.py:Net", "count", "KeyError: 'network is tired'"),
        ("--optimizer own.py:Soft", "count", "KeyError: 'optimizer is tired'"),
        ("--data own.py:digits --eps 0.2", "__getitem__", "KeyError: 'a row is tired'"),
        ("--data own.py:digits --eps 0.2 --in-memory no", "__getitem__", "KeyError: 'a row is tired'"),
    ],
)
def test_code_of_ones_own_that_fails_is_named_with_its_lines(
    options: str, function: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(FAILING)
    result = engm("train", *LONGER.split(), *options.split(), "--out", "run")
    assert result.exit_code == 1, result.exception
    address = next(word for word in options.split() if word.startswith("own.py"))
    said = result.stderr
    message = said[said.index("engm: ") :]
    assert message.removeprefix("engm: ").removeprefix(f"{tmp_path}/").startswith(f"{address} failed: {why}")
    files = {line.split('"')[1] for line in message.splitlines() if line.startswith("  File ")}
    assert files == {f"{tmp_path}/own.py"}
    lines = [line for line in message.splitlines() if line.startswith("  File ")]
    assert lines[-1].endswith(f"in {function}")
    assert f", at {tmp_path}/own.py:{lines[-1].split('line ')[1].split(',')[0]}" in message
    assert "goes on where it was left" in message
    assert "Traceback" not in said


def test_and_its_run_goes_on_from_the_last_epoch(tmp_path: Path) -> None:
    own, run = tmp_path / "own.py", tmp_path / "run"
    own.write_text(FAILING)
    assert engm("train", *LONGER.split(), "--objective", f"{own}:tired", "--out", run).exit_code == 1
    before = RunFolder(run).trained()
    assert before[0] > 1
    own.write_text(FAILING.replace("10)", "10**9)"))
    for name in [name for name in sys.modules if name.startswith("engm_own_")]:
        del sys.modules[name]
    with pytest.warns(UserWarning, match="the file is another one"):
        result = engm("train", "--out", run)
    assert result.exit_code == 0, result.output
    assert f"epoch   {before[0]}/" not in result.stdout
    assert RunFolder(run).trained() == (12, 12)


def test_what_is_no_fault_of_code_of_ones_own_keeps_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FAILING.replace('count("objective", 10)', "pass"))
    broken = mock.patch("engm.recipes.training.trainer.Trainer.finish_epoch", side_effect=KeyError("ours"))
    with broken:
        result = engm("train", *TINY.split(), "--objective", f"{tmp_path}/own.py:tired", "--out", tmp_path / "run")
    assert isinstance(result.exception, KeyError)


@pytest.mark.parametrize("module", ["engm.recipes.cli", "typer", "rich.console", "torch"])
def test_ctrl_c_while_modules_are_imported_is_no_traceback(module: str, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # in a shell's background it is ignored
        "class Interrupted:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from engm.recipes.__main__ import main\n"
        f"sys.argv = ['engm', 'train', '--data', 'digits', '--out', {str(tmp_path / 'run')!r}]\n"
        "main()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 130
    assert len((ran.stdout + ran.stderr).splitlines()) <= 1
    assert not (tmp_path / "run").exists()


def test_the_installed_command_is_that_one() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"] == {"engm": "engm.recipes.__main__:main"}


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


def test_a_second_ctrl_c_at_the_end_is_no_traceback() -> None:
    code = (
        "import atexit, os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from engm.recipes.__main__ import main\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "sys.argv = ['engm', '--version']\n"
        "main()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == -signal.SIGINT
    assert ran.stderr == ""


def test_a_command_without_a_standard_output_works(tmp_path: Path) -> None:
    command = f"{sys.executable} -m engm.recipes train {TINY} --width 2 --loggers none --out {tmp_path}/run >&-"
    ran = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "run/results.json").is_file()


@pytest.mark.parametrize(("content", "why"), [("[]", "got a list"), ("{}", "config, data, test is missing")])
def test_results_of_something_else_are_one_message(content: str, why: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert engm("train", *TINY.split(), "--width", 2, "--loggers", "none", "--out", run).exit_code == 0
    (run / "results.json").write_text(content)
    for command in (("train", "--out", run), ("report", run)):
        result = engm(*command)
        assert result.exit_code == 1
        message = " ".join(result.stderr.split())
        assert message.startswith(f"engm: {run}/results.json: "), result.exception
        assert why in message


def test_a_number_that_is_none_in_a_file_is_told_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("lr = 'fast'\n")
    result = engm("train", "--config", tmp_path / "run.toml", "--out", tmp_path / "run")
    assert f"engm: {tmp_path}/run.toml: lr: expected a number" in " ".join(result.stderr.split())
