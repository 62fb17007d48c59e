"""Averages of the weights: even ones against torch's, their statistics, resuming, and what is said of both networks."""

from __future__ import annotations

import csv
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_runs import PLAIN, tiny_dataset
from torch.optim.swa_utils import AveragedModel, update_bn

from engm.recipes.accuracy import evaluate
from engm.recipes.config import RunConfig
from engm.recipes.processes import Processes
from engm.recipes.runs.folder import RunFolder, train
from engm.recipes.runs.progress import RunView
from engm.recipes.runs.report import markdown
from engm.recipes.runs.termination import TerminatedError
from engm.recipes.runs.view import NoView
from engm.recipes.training.run import Run

CPU = Processes(torch.device("cpu"))
SWA = replace(PLAIN, optimizer="msgd", attack_steps=1, epochs=4, swa_start=2)


def trained(config: RunConfig) -> Run:
    run = Run(config, CPU, tiny_dataset())
    while not run.over:
        run.finish_epoch(run.train_epoch(lambda: None))
    return run


def test_the_even_average_and_its_statistics_are_torchs() -> None:
    run = Run(SWA, CPU, tiny_dataset())
    oracle = AveragedModel(run.net)
    for epoch in range(1, 5):
        run.finish_epoch(run.train_epoch(lambda: None))
        if epoch == 1:
            assert run.evaluated is run.net
        else:
            oracle.update_parameters(run.net)
    images, _ = run.dataset.train.batch(torch.arange(68))
    update_bn([images], oracle)
    found, expected = run.evaluated.state_dict(), oracle.module.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
    assert not torch.equal(found["linear.weight"], run.net.state_dict()["linear.weight"])


def test_both_networks_have_figures_and_the_average_is_chosen_by() -> None:
    run = trained(SWA)
    plain = evaluate(run.net, run.dataset.validation, run.evaluation)
    average = evaluate(run.evaluated, run.dataset.validation, run.evaluation)
    row = run.history[-1]
    assert (row["natural"], row["robust"]) == (average.natural, average.robust)
    assert (row["plain_natural"], row["plain_robust"]) == (plain.natural, plain.robust)
    assert run.history[0]["plain_robust"] is None  # there was no average
    assert run.best is not None
    assert run.best.score == max(row["robust"] for row in run.history)
    assert "plain_robust" not in trained(replace(SWA, swa_start=None, epochs=1)).history[0]


def test_the_average_takes_nothing_of_the_training_away() -> None:
    """Neither the weights that train nor the random state are others than without an average."""
    nets = []
    for config in (SWA, replace(SWA, swa_start=None), replace(SWA, swa_start=None, ema=0.5)):
        nets.append(trained(config).net.state_dict())
        nets[-1]["random"] = torch.get_rng_state()
    for other in nets[1:]:
        assert all(torch.equal(nets[0][name], other[name]) for name in other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    train(SWA, path, CPU, dataset=tiny_dataset())
    return path


class Ends(NoView):
    """Ends the run at a step, or within the validation of an epoch."""

    def __init__(self, steps: int, evaluation: bool) -> None:
        self._steps, self._evaluation = steps, evaluation
        self.done = 0

    def begin(self, run: Run) -> None:
        self.run = run

    def on_step(self) -> None:
        if not self._evaluation and self.run.trainer.steps == self._steps:
            raise KeyboardInterrupt

    def on_evaluation(self, done: int, total: int) -> None:
        if self._evaluation and self.run.trainer.steps == self._steps:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("steps", "evaluation"), [(8, False), (9, False), (8, True), (12, True)])
def test_a_stopped_run_goes_on_to_the_same_bits(steps: int, evaluation: bool, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with suppress(KeyboardInterrupt, TerminatedError):
        train(SWA, path, CPU, view=Ends(steps, evaluation), dataset=tiny_dataset())
    assert not RunFolder(path).results_file.exists()
    results = train(SWA, path, CPU, dataset=tiny_dataset())
    expected = RunFolder(whole).results()
    assert results["test"] == expected["test"]
    figures = ("robust", "plain_robust", "loss")
    assert [[row[f] for f in figures] for row in results["history"]] == [
        [row[f] for f in figures] for row in expected["history"]
    ]
    for which in ("best", "last"):
        mine, other = RunFolder(path).weights(which), RunFolder(whole).weights(which)  # type: ignore[arg-type]
        assert all(torch.equal(mine.weights[name], tensor) for name, tensor in other.weights.items())


def test_results_and_tables_have_both(whole: Path) -> None:
    results = RunFolder(whole).results()
    kept = RunFolder(whole).weights("last")
    run = Run(SWA, CPU, tiny_dataset())
    for name, weights in (("last", kept.weights), ("last_plain", kept.plain)):
        assert weights is not None
        found = run.evaluate("test", run.with_weights(weights))
        assert results["test"][name]["robust"] == found.robust, name
    table = markdown([results])
    assert "| Best, plain | Last, plain |" in table.splitlines()[0]
    assert f"| {100 * results['test']['last_plain']['robust']:.1f} |" in table.splitlines()[2]
    assert "plain" not in markdown([{**results, "test": {"best": results["test"]["best"]}}]).splitlines()[0]
    with (whole / "log" / "epoch.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["plain_robust"] == "" for row in rows] == [True, False, False, False]


def test_what_is_shown_of_an_epoch(tmp_path: Path) -> None:
    console = Console(record=True, width=300)
    with RunView(console) as view:
        train(replace(SWA, epochs=2), tmp_path / "run", CPU, view=view, dataset=tiny_dataset())
    first, second = (line for line in console.export_text().splitlines() if line.startswith("epoch"))
    assert "plain -" in first
    assert "%" in second.partition("plain")[2].split()[0]


def test_a_log_of_an_earlier_version_gets_the_new_columns(tmp_path: Path) -> None:
    config = replace(SWA, swa_start=None, ema=0.5, epochs=2)
    with suppress(KeyboardInterrupt):
        train(config, tmp_path / "run", CPU, view=Ends(6, False), dataset=tiny_dataset())
    log = tmp_path / "run" / "log" / "epoch.csv"
    lines = log.read_text().splitlines()
    names = lines[0].split(",")
    cut = [index for index, name in enumerate(names) if not name.startswith("plain")]
    log.write_text("".join(",".join(line.split(",")[i] for i in cut) + "\n" for line in lines))
    train(config, tmp_path / "run", CPU, dataset=tiny_dataset())
    with log.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert (rows[0]["plain_robust"], rows[1]["plain_robust"] != "") == ("", True)


def test_one_average_at_a_time() -> None:
    with pytest.raises(ValueError, match="--ema and --swa-start are two averages"):
        RunConfig(ema=0.9, swa_start=3)
