"""SIGTERM: the state at the next batch is kept, the command says so, and the resumed run has the same bits."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny_runs import PLAIN, tiny_dataset
from typer.testing import CliRunner

from engm.recipes.cli import app
from engm.recipes.processes import Processes
from engm.recipes.runs.files import LAST
from engm.recipes.runs.folder import RunFolder, train
from engm.recipes.runs.termination import STATUS, Deadline, TerminatedError, noted
from engm.recipes.runs.view import NoView
from engm.recipes.training.run import Run

CONFIG = replace(PLAIN, optimizer="engm", save_every=1000, loggers=())
TINY = "--data digits --width 2 --epochs 2 --batch-size 32 --attack-steps 1 --evaluation-steps 2 --train-examples 64"


def train_tiny(path: Path, view: NoView | None = None) -> dict:
    return train(CONFIG, path, Processes(torch.device("cpu")), view=view, dataset=tiny_dataset())


def end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class EndsAt(NoView):
    """A watcher at whose call of some kind and number the process is asked to end."""

    def __init__(self, kind: str, number: int) -> None:
        self._kind, self._left = kind, number

    def _count(self, kind: str) -> None:
        if kind == self._kind:
            self._left -= 1
            if self._left == 0:
                end()

    def on_step(self) -> None:
        self._count("step")

    def on_evaluation(self, done: int, total: int) -> None:
        self._count("evaluation")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    train_tiny(path)
    return path


@pytest.mark.parametrize(
    ("kind", "number", "steps"),
    [
        ("step", 1, 2),  # within an epoch of four steps
        ("step", 3, 4),  # before the last batch of one
        ("step", 4, 4),  # after it: the validation is next
        ("evaluation", 2, 8),  # in the validation of the second epoch
        ("evaluation", 4, 12),  # in the test
    ],
)
def test_the_next_batch_is_the_last_and_nothing_is_lost(
    kind: str, number: int, steps: int, tmp_path: Path, undisturbed: Path
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TerminatedError, match=f"after step {steps}, which is saved"):
        train_tiny(tmp_path / "run", EndsAt(kind, number))
    assert signal.getsignal(signal.SIGTERM) == before
    folder = RunFolder(tmp_path / "run")
    assert not folder.results_file.exists()
    assert folder.store.names(LAST)[0] == f"{LAST}{steps:08d}"
    results, whole = train_tiny(tmp_path / "run"), RunFolder(undisturbed).results()
    for name in ("test", "validation", "best_epoch"):
        assert results[name] == whole[name], name
    ended, expected = folder.weights("last").weights, RunFolder(undisturbed).weights("last").weights
    assert all(torch.equal(ended[name], tensor) for name, tensor in expected.items())
    figures = ("loss", "weight_mean", "norm_mean", "robust")
    assert [[row[f] for f in figures] for row in results["history"]] == [
        [row[f] for f in figures] for row in whole["history"]
    ]


def test_a_loader_that_was_ended_too_is_no_fault(tmp_path: Path) -> None:
    def fail(self: Run, *_: object) -> None:
        end()
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    with mock.patch.object(Run, "step", fail), pytest.raises(TerminatedError, match="the last checkpoint is kept"):
        train_tiny(tmp_path / "run")
    fault = mock.patch.object(Run, "step", side_effect=RuntimeError("DataLoader worker"))
    with fault, pytest.raises(RuntimeError, match=r"^DataLoader worker$"):  # nobody asked
        train_tiny(tmp_path / "other")


def test_the_command_says_so_and_ends_with_the_status_of_sigterm(tmp_path: Path) -> None:
    command = ["train", *TINY.split(), "--loggers", "none", "--threads", "1", "--out", str(tmp_path / "run")]
    with mock.patch("engm.recipes.runs.progress.RunView.on_step", side_effect=end):
        result = CliRunner().invoke(app, command)
    assert result.exit_code == STATUS == 143
    message = " ".join(result.stderr.split())
    assert "ended by SIGTERM after step 2, which is saved; the same command" in message
    assert RunFolder(tmp_path / "run").store.names(LAST)
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert again.output.startswith("Going on with the run in")


def test_a_comparison_says_the_short_command_that_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "both runs"
    command = ["compare", *TINY.split(), "--loggers", "none", "--threads", "1", "--optimizers", "msgd", "--seeds", "1"]
    with mock.patch("engm.recipes.runs.progress.RunView.on_step", side_effect=end):
        result = CliRunner().invoke(app, [*command, "--out", str(out)])
    assert result.exit_code == STATUS
    said = f"the same command, or engm compare --out '{out}', goes on where it was left"
    assert said in " ".join(result.stderr.split())
    again = CliRunner().invoke(app, ["compare", "--out", str(out)])
    assert again.exit_code == 0, again.output
    with mock.patch("engm.recipes.runs.compare.load_in_turn", side_effect=lambda *_: end()):  # before there is a plan
        early = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "other")])
    assert "ended by SIGTERM; the same command goes on where it was left" in " ".join(early.stderr.split())


def test_outside_of_training_a_command_ends_at_once(tmp_path: Path) -> None:
    with mock.patch("engm.recipes.runs.report.runs_of", side_effect=lambda path: end()):
        result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert (result.exit_code, "ended by SIGTERM" in result.stderr) == (143, True)


class Clock:
    """Time that passes by so many seconds a look."""

    def __init__(self, pace: float) -> None:
        self.now, self._pace = 0.0, pace

    def monotonic(self) -> float:
        self.now += self._pace
        return self.now


def test_a_deadline_is_near_when_the_longest_wait_would_lead_beyond_it() -> None:
    with mock.patch("engm.recipes.runs.termination.time", Clock(1.0)) as clock:
        deadline = Deadline("20s", end=20.0)
        assert [deadline.near() for _ in range(10)] == [False] * 10
        clock.now += 3  # a step of four seconds, at the fifteenth second
        assert not deadline.near()
        assert deadline.near()  # at the sixteenth


def test_a_time_limit_ends_as_sigterm_does_and_the_same_command_goes_on(tmp_path: Path, undisturbed: Path) -> None:
    """Every look takes a second: with a limit of so many the run ends after a few steps or within a validation."""
    path, ended = tmp_path / "run", []
    for limit in (4, 5, 9, 60):
        with mock.patch("engm.recipes.runs.termination.time", Clock(1.0)):
            try:
                config = replace(CONFIG, time_limit=f"{limit}s")
                train(config, path, Processes(torch.device("cpu")), dataset=tiny_dataset(), began=0.0)
            except TerminatedError as error:
                ended.append(str(error))
    assert [line.partition(" after")[0] for line in ended] == [f"ended by --time-limit {n}s" for n in (4, 5, 9)]
    assert RunFolder(path).results()["test"] == RunFolder(undisturbed).results()["test"]
    ended_with, expected = RunFolder(path).weights("last").weights, RunFolder(undisturbed).weights("last").weights
    assert all(torch.equal(ended_with[name], tensor) for name, tensor in expected.items())


def test_the_command_ends_before_its_time_limit_with_the_same_status(tmp_path: Path) -> None:
    command = ["train", *TINY.split(), "--loggers", "none", "--threads", "1", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*command, "--time-limit", "1s"])
    assert result.exit_code == STATUS
    assert "ended by --time-limit 1s after step" in " ".join(result.stderr.split())
    assert "goes on where it was left" in " ".join(result.stderr.split())
    result = CliRunner().invoke(app, [*command, "--time-limit", "soon"])
    assert "--time-limit must be a time such as 3h30m" in " ".join(result.stderr.split())


def test_several_processes_end_together() -> None:
    class Two(Processes):
        def total(self, counts: list[int]) -> list[int]:  # type: ignore[override]
            return [count + 1 for count in counts]  # the other one was asked

    with noted() as termination:
        assert not termination.asked_of(Processes(torch.device("cpu")))
        assert termination.asked_of(Two(torch.device("cpu"), 0, 2))
        end()
        assert termination.asked_of(Processes(torch.device("cpu")))
