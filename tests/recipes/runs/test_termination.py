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
from engm.recipes.runs.termination import STATUS, TerminatedError, noted
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


def test_outside_of_training_a_command_ends_at_once(tmp_path: Path) -> None:
    with mock.patch("engm.recipes.runs.report.runs_of", side_effect=lambda path: end()):
        result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert (result.exit_code, "ended by SIGTERM" in result.stderr) == (143, True)


def test_several_processes_end_together() -> None:
    class Two(Processes):
        def total(self, counts: list[int]) -> list[int]:  # type: ignore[override]
            return [count + 1 for count in counts]  # the other one was asked

    with noted() as termination:
        assert not termination.asked_of(Processes(torch.device("cpu")))
        assert termination.asked_of(Two(torch.device("cpu"), 0, 2))
        end()
        assert termination.asked_of(Processes(torch.device("cpu")))
