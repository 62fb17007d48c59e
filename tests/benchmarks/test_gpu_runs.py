"""The training runs of the GPU benchmarks: planned to fit, an epoch of each method in turn, gone on with later."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from gpu import runs, tables
from gpu.record import Record
from gpu.subset import made_up, subset
from gpu.timing import Bench

CPU = torch.device("cpu")


@pytest.fixture
def arguments(tmp_path):
    np.savez(tmp_path / "images.npz", **subset(made_up(32, 10, side=8), 32, 10))
    return Namespace(
        data=tmp_path / "images.npz", runs=tmp_path / "runs", seeds=[3], batch=8, epochs=None, training_precision="tf32"
    )


@pytest.fixture(autouse=True)
def switches():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def called(arguments, out, seconds=600.0):
    """The stage's only case, as a call of the script would leave it."""
    with Record(out).stage("runs", seconds, CPU).running() as stage:
        runs.run(Bench(CPU, tiny=True), stage, arguments)
    return json.loads((out / "gpu.json").read_text())["stages"]["runs"]["cases"][0]


def test_the_epochs_fit_the_time():
    epochs = runs.planned_epochs(budget=480, paces=[0.05, 0.06, 0.06], steps=70, looks=100)
    cost = (0.05 + 0.06 + 0.06) * (70 * epochs + 20 / 11 * 100)
    assert 0.75 * 480 < cost <= 0.85 * 480
    assert runs.planned_epochs(budget=10, paces=[1.0], steps=100, looks=5) == runs.LEAST_EPOCHS
    assert runs.planned_epochs(budget=1e6, paces=[0.01], steps=10, looks=5) == 120


def test_the_settings_are_the_papers_with_the_schedule_compressed(arguments):
    config = runs.configuration("a-engm", 1, 40, Bench(CPU, tiny=False), arguments)
    assert (config.optimizer, config.attack_steps, config.decay_epochs, config.step) == ("a-engm", 10, (25, 30), "auto")
    assert (config.lr, config.momentum, config.weight_decay) == (0.1, 0.9, 5e-4)


@pytest.mark.slow
def test_runs_go_on_from_their_folder(arguments, tmp_path, monkeypatch):
    begun = []
    trained = runs.Run.train_epoch

    def train_epoch(run, on_step):
        begun.append((run.config.optimizer, run.epoch))
        if len(begun) == 5:
            raise KeyboardInterrupt  # as the script ends a stage that takes too long
        return trained(run, on_step)

    monkeypatch.setattr(runs.Run, "train_epoch", train_epoch)
    with pytest.raises(KeyboardInterrupt):
        called(arguments, tmp_path / "first")
    partly = json.loads((tmp_path / "first/gpu.json").read_text())["stages"]["runs"]["in progress"]
    assert [partly["methods"][name]["epochs"] for name in runs.METHODS] == [2, 1, 1]
    case = called(arguments, tmp_path / "second")
    assert case["finished"]
    assert begun == [
        *(("msgd", 0), ("a-engm", 0), ("engm", 0), ("msgd", 1), ("a-engm", 1)),
        *(("a-engm", 1), ("engm", 1)),
    ]
    for name in runs.METHODS:
        row = case["methods"][name]
        assert [epoch["epoch"] for epoch in row["history"]] == [1, 2]
        assert row["test"]["last"]["examples"] == 10
        assert all(np.isfinite(epoch["loss"]) for epoch in row["history"])
    assert "seed 3" in "\n".join(tables.DRAW["runs"]([case]))
    assert called(arguments, tmp_path / "third")["methods"] == {
        name: row | {"steps": {"replayed": 0, "recorded": 0, "eager": {}}} for name, row in case["methods"].items()
    }, "a finished run is trained again"
    arguments.batch, arguments.training_precision = 16, "fp32"
    assert "choose another folder" in called(arguments, tmp_path / "fourth")["error"]


def test_a_call_without_time_says_that_another_is_needed(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(runs.Stage, "left", 3.0)  # less than an epoch of each takes
    case = called(arguments, tmp_path / "out")
    assert not case["finished"]
    assert [row["epochs"] for row in case["methods"].values()] == [0, 0, 0]
    assert "call again" in "\n".join(tables.DRAW["runs"]([case]))
