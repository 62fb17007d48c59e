"""A run that is made longer than planned: what stays as it was, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import CPU, PLAIN, KilledAt, tiny_dataset, train_tiny
from typer.testing import CliRunner, Result

from engm.recipes.cli import app
from engm.recipes.runs.folder import RunFolder, train

SHORT = replace(PLAIN, optimizer="msgd", epochs=2, attack_steps=1)


def same_weights(one: Path, other: Path) -> bool:
    found, expected = (RunFolder(path).weights("last").weights for path in (one, other))
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs at once, with the learning rate of two."""
    path = tmp_path_factory.mktemp("planned") / "run"
    train_tiny(replace(SHORT, epochs=4, schedule_epochs=2), path)
    return path


@pytest.mark.parametrize("stopped", [None, 3], ids=["finished", "killed"])
def test_a_longer_run_goes_on_to_the_bits_of_one_that_was_planned_so(
    stopped: int | None, tmp_path: Path, planned: Path
) -> None:
    path = tmp_path / "run"
    if stopped is None:
        assert train_tiny(SHORT, path)["epochs"] == 2
    else:
        with pytest.raises(KeyboardInterrupt):
            train_tiny(SHORT, path, view=KilledAt(stopped))
    with pytest.raises(KeyboardInterrupt):  # and once more, in the part that was added
        train_tiny(replace(SHORT, epochs=4), path, view=KilledAt(7 if stopped is None else 12))
    assert not RunFolder(path).results_file.exists()
    results = train_tiny(replace(SHORT, epochs=4), path)
    assert (results["epochs"], results["config"]["schedule_epochs"]) == (4, 2)
    assert [row["epoch"] for row in results["history"]] == [1, 2, 3, 4]
    assert results["config"]["decay_epochs"] == [1, 2] == list(SHORT.resolved().decay_epochs or ())
    whole = RunFolder(planned).results()
    assert same_weights(path, planned)
    assert (results["best_epoch"], results["test"]) == (whole["best_epoch"], whole["test"])
    assert train_tiny(replace(SHORT, epochs=4), path) == results  # over, and left alone


def test_what_is_past_stays(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train_tiny(SHORT, path)
    for config, message in (
        (replace(SHORT, epochs=1), "--epochs 1: the run in .* has trained for 2 epochs, and none is taken back"),
        (replace(SHORT, epochs=4, lr=0.2), r"holds a run with other settings: --lr 0.1 \(now 0.2\)"),
        (replace(SHORT, epochs=4, decay_epochs=(3,)), r"its decays by then \(1\) cannot be changed any more"),
        (replace(SHORT, decay_epochs=(1,)), "other settings: --decay-epochs"),
    ):
        with pytest.raises(ValueError, match=message):
            train_tiny(config, path)
    assert RunFolder(path).results()["epochs"] == 2
    results = train_tiny(replace(SHORT, epochs=3, decay_epochs=(1,)), path)  # the second was still to come
    assert [row["lr"] for row in results["history"]] == pytest.approx([0.1, 0.01, 0.01])


def test_nothing_is_changed_where_a_longer_run_finds_other_data(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train_tiny(SHORT, path)

    def files() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.suffix != ".lock"}

    before, dataset = files(), tiny_dataset()
    assert path / "results.json" in before
    dataset.train.labels[0] = 1 - dataset.train.labels[0]
    with pytest.raises(ValueError, match="the training images of halves are not those"):
        train(replace(SHORT, epochs=4), path, CPU, dataset=dataset)
    assert files() == before
    assert train_tiny(replace(SHORT, epochs=3), path)["epochs"] == 3


def test_a_schedule_that_has_ended_has_to_be_planned_anew(tmp_path: Path) -> None:
    config = replace(SHORT, schedule="cosine", epochs=1)
    train_tiny(config, tmp_path / "run")
    with pytest.raises(ValueError, match="with --schedule-epochs 3 it goes on to the end"):
        train_tiny(replace(config, epochs=3), tmp_path / "run")
    results = train_tiny(replace(config, epochs=3, schedule_epochs=3), tmp_path / "run")
    assert results["history"][1]["lr"] > results["history"][2]["lr"] > 0


def test_the_command_says_what_changes(tmp_path: Path) -> None:
    tiny = "--width 2 --batch-size 32 --attack-steps 1 --evaluation-steps 1 --train-examples 32 --test-examples 20"
    command = [
        "train",
        *tiny.split(),
        "--data",
        "digits",
        "--optimizer",
        "msgd",
        "--loggers",
        "none",
        "--step",
        "eager",
    ]

    def engm(*more: str) -> str:
        result = CliRunner().invoke(app, [*command, *more, "--out", str(tmp_path / "run")], env={"COLUMNS": "400"})
        assert "Traceback" not in result.output
        return result.output + result.stderr

    engm("--epochs", "1")
    curves = (tmp_path / "run" / "curves.png").read_bytes()
    line = engm("--epochs", "2").splitlines()[0]
    assert "Going on with the run in" in line
    assert "to 2 epochs in place of 1; the learning rate stays as it was, divided by 10 after epochs 1" in line
    assert (tmp_path / "run" / "curves.png").read_bytes() != curves
    assert "has trained for 2 epochs" in engm("--epochs", "1")
    assert "was finished before; nothing was done" in engm("--epochs", "2")


def written(path: Path, *, seed: int = 0) -> Path:
    """A file of little images, the same for the same seed."""
    generator = np.random.default_rng(seed)
    sizes = {"train": 64, "test": 24}
    images = {f"x_{part}": generator.integers(0, 256, (n, 8, 8, 1), np.uint8) for part, n in sizes.items()}
    labels = {f"y_{part}": np.arange(n) % 2 for part, n in sizes.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **images, **labels)
    return path


FILE = "--model small-resnet --width 2 --batch-size 16 --attack-steps 1 --evaluation-steps 1 --validation-examples 16 "
FILE += "--threads 1 --step eager --eps 0.2"


def engm(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})


def said(result: Result) -> str:
    assert result.exit_code == 1, result.output
    return " ".join(result.stderr.split())


@pytest.mark.parametrize("setting", ["data", "extra"])
def test_a_run_goes_on_where_its_data_lie_now(setting: str, tmp_path: Path) -> None:
    files = {name: written(tmp_path / f"{name}.npz") for name in ("data", "extra")}
    given = [part for name, file in files.items() for part in (f"--{name}", file)]
    run, whole = tmp_path / "run", tmp_path / "whole"
    for path, epochs in ((run, 1), (whole, 2)):
        length = ("--epochs", epochs, "--decay-epochs", 1)
        assert engm("train", *given, *FILE.split(), *length, "--out", path).exit_code == 0
    moved, other = tmp_path / "new" / "place.npz", written(tmp_path / "other.npz", seed=1)
    moved.parent.mkdir()
    files[setting].rename(moved)
    before = (run / "config.toml").read_text()

    message = said(engm("train", "--out", run, "--epochs", 2))
    assert f"nothing is at {files[setting]}, where data of the run in {run} should lie" in message
    assert f"engm train --out {run} --{setting} PLACE" in message
    for more in ((), ("--epochs", 2)):  # finished, and made longer
        message = said(engm("train", "--out", run, f"--{setting}", other, *more))
        assert "are not those that this run was trained on" in message
    assert "holds a run with other settings" in said(engm("train", "--out", run, "--data", "digits"))
    assert (run / "config.toml").read_text() == before

    assert engm("train", "--out", run, f"--{setting}", moved).exit_code == 0
    assert getattr(RunFolder(run).config(), setting) == str(moved)
    assert engm("train", "--out", run, "--epochs", 2).exit_code == 0
    assert same_weights(run, whole)


def test_evaluation_says_how_to_name_the_new_place_and_then_finds_it(tmp_path: Path) -> None:
    data, run = written(tmp_path / "data.npz"), tmp_path / "run"
    assert engm("train", "--data", data, *FILE.split(), "--epochs", 1, "--out", run).exit_code == 0
    data.rename(tmp_path / "moved.npz")
    evaluate = ("evaluate", run, "--attack", "natural", "--device", "cpu")
    assert f"engm train --out {run} --data PLACE" in said(engm(*evaluate))
    assert engm("train", "--out", run, "--data", tmp_path / "moved.npz").exit_code == 0
    assert engm(*evaluate).exit_code == 0


def test_a_comparison_keeps_its_plan_where_it_is_given_other_data(tmp_path: Path) -> None:
    data, other, out = written(tmp_path / "data.npz"), written(tmp_path / "other.npz", seed=1), tmp_path / "many"
    begin = ("compare", "--data", data, *FILE.split(), "--epochs", 1, "--optimizers", "msgd", "--seeds", 1)
    assert engm(*begin, "--out", out).exit_code == 0
    plan = (out / "comparison-plan.json").read_text()
    assert "are not those that this run was trained on" in said(engm("compare", "--out", out, "--data", other))
    assert (out / "comparison-plan.json").read_text() == plan
    moved = data.rename(tmp_path / "moved.npz")
    assert engm("compare", "--out", out, "--data", moved).exit_code == 0
    assert RunFolder(out / "msgd-seed0").config().data == str(moved)
    assert str(moved) in (out / "comparison-plan.json").read_text()
