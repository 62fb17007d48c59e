"""A run that is made longer than planned: what stays as it was, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import CPU, PLAIN, KilledAt, tiny_dataset, train_tiny
from typer.testing import CliRunner

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
    command = ["train", *tiny.split(), "--data", "digits", "--optimizer", "msgd", "--loggers", "none"]

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
