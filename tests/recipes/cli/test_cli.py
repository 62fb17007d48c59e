"""The commands as a user types them: what they write, and how they fail."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from engm.checks import NonFiniteError
from engm.recipes.cli import app
from engm.recipes.config import RunConfig, option
from engm.recipes.runs.folder import RunFolder
from engm.recipes.storage.folder_lock import locked

_TINY = "--width 2 --epochs 2 --batch-size 32 --attack-steps 2 --evaluation-steps 3 --train-examples 64 --threads 1"
TINY = [*_TINY.split(), "--step", "eager"]


def tiny(*options: object) -> list[object]:
    """The options of the little run, without those that are given in their place, and then these."""
    kept = [part for pair in zip(TINY[::2], TINY[1::2], strict=True) if pair[0] not in options for part in pair]
    return [*kept, *options]


def engm(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


def failed(*arguments: object, status: int = 1) -> str:
    """What a command that must fail says: one message, on standard error, and no traceback."""
    result = engm(*arguments)
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    message = " ".join(result.stderr.split())
    assert "Traceback" not in message
    assert message.startswith("engm:")
    return message


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    options = tiny("--step", "auto", "--optimizer", "a-engm", "--loggers", "csv,json,tensorboard")
    result = engm("train", *options, "--out", path)
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    images = {f"x_{part}": draw.integers(0, 256, (80, 8, 8, 3), np.uint8) for part in ("train", "test")}
    labels = {f"y_{part}": draw.integers(0, 3, 80) for part in ("train", "test")}
    np.savez(tmp_path / "data.npz", **images, **labels)
    return tmp_path / "data.npz"


def test_train_leaves_a_whole_run(trained: Path) -> None:
    present = {path.name for path in trained.iterdir()}
    curves = {"curves.png", "curves.svg", "curves.pdf"}
    assert {"config.toml", "checkpoints", "log", "results.json", *curves} <= present
    assert {"step.csv", "epoch.csv", "log.jsonl"} <= {path.name for path in (trained / "log").iterdir()}
    assert (trained / "curves.png").read_bytes()[:4] == b"\x89PNG"
    config = RunFolder(trained).config()
    assert (config.optimizer, config.width, config.decay_epochs) == ("a-engm", 2, (1, 2))
    assert config == config.resolved()


def test_the_same_command_and_the_folder_alone_go_on(trained: Path) -> None:
    for arguments in (["--out", trained], [*TINY, "--optimizer", "A-ENGM", "--out", trained]):
        result = engm("train", *arguments)
        assert result.exit_code == 0, result.output
        assert "A-ENGM" in result.output
    assert "was finished before; nothing was done" in result.output
    assert "--optimizer a-engm (now engm)" in failed("train", "--out", trained, "--optimizer", "engm")


def test_every_setting_is_an_option() -> None:
    page = engm("train", "--help").output
    assert all(option(f.name)[:20] in page for f in fields(RunConfig))


def test_evaluate_keeps_what_it_found(trained: Path) -> None:
    arguments = [
        "evaluate",
        trained,
        "--attack",
        "pgd3",
        "--attack",
        "pgd3-ce",
        "--attack",
        "deepfool",
        "--examples",
        "20",
    ]
    result = engm(*arguments)
    assert result.exit_code == 0, result.output
    found = json.loads((trained / "evaluation.json").read_text())
    for which in ("best", "last"):
        pgd, ce, deepfool = (found[which][name][0] for name in ("pgd3", "pgd3-ce", "deepfool"))
        assert 0 <= pgd["accuracy"] <= ce["accuracy"] + 0.2
        assert deepfool["rho"] > 0
        assert pgd["examples"] == 20
    with mock.patch("engm.recipes.evaluation.asking.run_attack", side_effect=AssertionError("computed again")):
        assert engm(*arguments).exit_code == 0
    assert engm("evaluate", trained, "--attack", "natural", "--examples", "20", "--checkpoint", "last").exit_code == 0
    again = json.loads((trained / "evaluation.json").read_text())
    assert again["last"].keys() == found["last"].keys() | {"natural"}


def test_evaluate_with_autoattack(trained: Path) -> None:
    result = engm(
        "evaluate", trained, "--attack", "autoattack", "--examples", 4, "--checkpoint", "last", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    found = json.loads((trained / "evaluation.json").read_text())["last"]["autoattack"][0]
    assert found["accuracy"] == pytest.approx(found["reported"])


def test_compare(tmp_path: Path) -> None:
    arguments = [
        "compare",
        *TINY,
        "--out",
        tmp_path / "all",
        "--optimizers",
        "msgd,n-engm",
        "--seeds",
        "2",
        "--alpha",
        "5",
    ]
    first = engm(*arguments)
    assert first.exit_code == 0, first.output
    cells = sorted(path.name for path in (tmp_path / "all").iterdir() if path.is_dir())
    assert cells == ["msgd-seed0", "msgd-seed1", "n-engm-seed0", "n-engm-seed1"]
    assert RunFolder(tmp_path / "all" / "n-engm-seed1").results()["alpha"] == 0.5
    table = (tmp_path / "all" / "comparison.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:4]] == ["MSGD", "N-ENGM"]
    assert all(line.count("±") >= 4 for line in table[2:4])
    (tmp_path / "all" / "comparison.md").unlink()
    with mock.patch("engm.recipes.training.trainer.Trainer.step", side_effect=AssertionError("trained again")):
        for again in (arguments, ["compare", "--out", tmp_path / "all"]):
            result = engm(*again)
            assert result.exit_code == 0, result.output
    assert f"Going on with the comparison in {tmp_path / 'all'}: msgd, n-engm; seeds 0, 1." in result.output
    assert (tmp_path / "all" / "comparison.md").read_text().splitlines() == table
    report = engm("report", tmp_path / "all", "--out", tmp_path / "report")
    assert report.exit_code == 0, report.output
    assert (tmp_path / "report" / "report.md").read_text().splitlines()[2:4] == table[2:4]


def test_a_comparison_that_goes_on_keeps_its_settings(tmp_path: Path) -> None:
    out = tmp_path / "all"
    assert engm("compare", *TINY, "--out", out, "--optimizers", "msgd", "--seeds", "1").exit_code == 0
    plan = (out / "comparison-plan.json").read_bytes()
    message = failed("compare", "--out", out, "--seeds", "7,8", "--lr", "0.01")
    assert f"{out} holds a comparison with other settings: --lr 0.1 (now 0.01)" in message
    assert (out / "comparison-plan.json").read_bytes() == plan
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["msgd-seed0"]
    more = engm(
        "compare", "--out", out, "--seeds", "0,7", "--epochs", RunFolder(out / "msgd-seed0").config().epochs + 1
    )
    assert more.exit_code == 0, more.output
    one, other = (RunFolder(out / f"msgd-seed{seed}").config() for seed in (0, 7))
    assert one.differences(other) == {"seed": (0, 7)}
    assert "| MSGD | 2 |" in (out / "comparison.md").read_text()


def test_a_mistyped_folder_begins_no_comparison(tmp_path: Path) -> None:
    assert "there is no comparison in" in failed("compare", "--out", tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_compare_goes_on_when_a_run_diverges(tmp_path: Path) -> None:
    arguments = [*TINY, "--out", tmp_path / "all", "--optimizers", "msgd,sngm", "--seeds", "4,"]
    with mock.patch("engm.recipes.training.optimizer.engm.MSGD", side_effect=NonFiniteError("not finite")):
        message = failed("compare", *arguments)
    assert "msgd-seed4 diverged; the others are in" in message
    assert "| SNGM | 1 |" in (tmp_path / "all" / "comparison.md").read_text()


@pytest.mark.parametrize("kind", ["safetensors", "pt", "pth", "pt2"])
def test_export(trained: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "new" / f"net.{kind}"
    result = engm("export", trained, "--out", file, "--checkpoint", "last")
    assert result.exit_code == 0, result.output
    weights = RunFolder(trained).weights("last").weights
    if kind == "safetensors":
        from safetensors.torch import load_file

        found = load_file(file)
    elif kind in ("pt", "pth"):
        found = torch.load(file, weights_only=True)
    else:
        program = torch.export.load(file).module()
        assert program(torch.rand(5, 1, 8, 8)).shape == (5, 10)
        found = program.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_python_m_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "engm.recipes", "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Usage: engm train" in done.stdout


def test_a_mistyped_folder_begins_no_run(tmp_path: Path) -> None:
    assert "there is no run in" in failed("train", "--out", tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_a_lost_picture_is_drawn_again_and_brackets_stay(trained: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run[/x]"
    shutil.copytree(trained, copy)
    (copy / "curves.png").unlink()
    result = engm("train", "--out", copy)
    assert result.exit_code == 0, result.output
    assert (copy / "curves.png").is_file()
    assert "run[/x]" in "".join(result.output.split())


def test_a_network_that_nothing_fools(trained: Path, tmp_path: Path) -> None:
    with mock.patch("engm.recipes.evaluation.attacks.DeepFool.__call__") as attack:
        attack.side_effect = lambda net, x: mock.Mock(distances=torch.ones(len(x)), broken=torch.zeros(len(x)).bool())
        for _ in range(2):  # computed, and read back
            arguments = ["--attack", "deepfool", "--examples", 7, "--checkpoint", "last"]
            result = engm("evaluate", trained, *arguments)
            assert "no adversary found" in result.output, result.output
    assert "eps must be a finite number" in failed("evaluate", trained, "--eps", "inf")


def test_no_option_is_an_abbreviation_for_torchrun() -> None:
    """torchrun refuses an option that several of its own begin with, even behind the module's name."""
    from torch.distributed.run import get_args_parser

    theirs = [name for action in get_args_parser()._actions for name in action.option_strings]
    for f in fields(RunConfig):
        assert sum(name.startswith(option(f.name)) for name in theirs) < 2, f.name


class TestFailures:
    """Each is one message that says what to do, a non-zero exit, and nothing half-written."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--data", "cifar11"], "did you mean cifar10"),
            (["--data", "nowhere/data.npz"], "nowhere/data.npz"),
            (["--model", "resnet81"], "resnet"),
            (["--objective", "tradez"], "did you mean trades"),
            (["--optimizer", "egnm"], "did you mean engm"),
            (["--lr", "fast"], "--lr: expected a number"),
            (["--epochs", "0"], "--epochs must be at least 1"),
            (["--batch-size", "5000"], "5000"),
            (["--device", "cuda:7"], "--device cuda:7"),
            (["--device", "gpu"], "unknown --device 'gpu'"),
            (["--config", "none.toml"], "no configuration file at none.toml"),
            (["--loggers", "cvs"], "did you mean csv"),
        ],
    )
    def test_wrong_settings(self, tmp_path: Path, arguments: list[str], message: str) -> None:
        assert message in failed("train", *tiny(*arguments), "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_data_of_another_shape_or_class(self, trained: Path, npz: Path, tmp_path: Path) -> None:
        arrays = dict(np.load(npz))
        arrays["y_train"] = arrays["y_train"] - 1
        np.savez(npz, **arrays)
        message = failed("train", *TINY, "--data", npz, "--validation-examples", 10, "--out", tmp_path / "run")
        assert "class indices from 0" in message
        assert not (tmp_path / "run").exists()

    def test_data_that_are_others_than_in_training(self, npz: Path, tmp_path: Path) -> None:
        options = ["--data", npz, "--validation-examples", 10, "--model", "small-resnet", "--train-examples", 64]
        run = tmp_path / "run"
        assert engm("train", *tiny(*options, "--epochs", 1), "--out", run).exit_code == 0
        arrays = dict(np.load(npz))
        arrays["y_train"][0] = arrays["y_test"][0] = 3  # one class more
        np.savez(npz, **arrays)
        message = failed("evaluate", run, "--attack", "natural")
        assert "for data with its 4 classes" in message
        assert "are these the data that the run was trained on?" in message

    def test_a_loss_that_is_not_finite(self, tmp_path: Path) -> None:
        options = ["--lr", "1e30", "--weight-decay", "0", "--optimizer", "msgd"]
        message = failed("train", *TINY, *options, "--out", tmp_path / "run")
        assert "finite" in message
        assert "a smaller --lr" in message

    def test_out_of_memory(self, tmp_path: Path) -> None:
        for error in (
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"),
        ):
            with mock.patch("engm.recipes.training.trainer.Trainer.step", side_effect=error):
                assert "smaller --batch-size" in failed("train", *TINY, "--out", tmp_path / "run")

    def test_a_full_disk(self, tmp_path: Path) -> None:
        full = OSError(errno.ENOSPC, "No space left on device")
        with mock.patch("engm.recipes.storage.checkpoint.write_synced", side_effect=full):
            message = failed("train", *TINY, "--out", tmp_path / "run")
        assert "No space left on device" in message
        assert "free some space" in message
        assert not list((tmp_path / "run" / "checkpoints").glob("*step*"))
        result = engm("train", *TINY, "--out", tmp_path / "run")  # with space again
        assert result.exit_code == 0, result.output

    def test_a_folder_in_use(self, tmp_path: Path) -> None:
        with mock.patch("engm.recipes.training.trainer.Trainer.step", side_effect=KeyboardInterrupt):
            engm("train", *TINY, "--out", tmp_path / "run")
        with locked(tmp_path / "run"):
            assert "another process is training in" in failed("train", *TINY, "--out", tmp_path / "run")

    def test_an_interruption(self, tmp_path: Path) -> None:
        with mock.patch("engm.recipes.training.trainer.Trainer.step", side_effect=KeyboardInterrupt):
            message = failed("train", *TINY, "--out", tmp_path / "run", status=130)
        assert "goes on where it was left" in message

    def test_processes_that_nobody_started(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert "start several processes with torchrun" in failed("train", *TINY, "--out", tmp_path / "run")

    def test_seeds(self, tmp_path: Path) -> None:
        for seeds in ("0", "three", ","):
            assert "at least 1" in failed("compare", *TINY, "--seeds", seeds, "--out", tmp_path / "all")

    def test_folders_that_are_no_runs(self, tmp_path: Path, trained: Path) -> None:
        assert "is no run folder" in failed("evaluate", tmp_path)
        assert "is no run folder" in failed("report", tmp_path)
        assert "is no run folder" in failed("export", tmp_path, "--out", tmp_path / "net.pt")
        assert "did you mean autoattack" in failed("evaluate", trained, "--attack", "autoatack")
        assert "unknown export format" in failed("export", trained, "--out", tmp_path / "net.tflite")
        assert not list(tmp_path.iterdir())

    def test_a_damaged_checkpoint(self, trained: Path, tmp_path: Path) -> None:
        import shutil

        copy = tmp_path / "copy"
        shutil.copytree(trained, copy)
        for file in (copy / "checkpoints").glob("best-*/tensors.safetensors"):
            file.write_bytes(file.read_bytes()[:-3])
        message = failed("export", copy, "--out", tmp_path / "net.pt")
        assert "tensors.safetensors" in message
        assert "checksum differs" in message
        assert not (tmp_path / "net.pt").exists()
