"""Runs whose steps come from recorded programs end with the bits of runs whose steps are taken as they are."""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_runs import PLAIN, tiny_dataset
from torch import nn

import engm
from engm.adversarial import AWP, OBJECTIVES, PGD, VANILLA
from engm.recipes.config import RunConfig
from engm.recipes.processes import Processes
from engm.recipes.runs.folder import RunFolder, train
from engm.recipes.runs.progress import RunView
from engm.recipes.training.recorded import CHANGING, StepReport
from engm.recipes.training.run import Run
from engm.recipes.training.trainer import Trainer

CPU = Processes(torch.device("cpu"))
SHALLOW = {norm: replace(PLAIN, model=f"shallow_networks:{norm}") for norm in ("batch", "group")}
# torch 2.11 cannot trace draws from a generator of one's own, which every random start makes.
TRACES_ALL = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)
needs_traced_draws = pytest.mark.skipif(not TRACES_ALL, reason="this torch cannot trace draws from a generator")


def trained(config: RunConfig, step: str, epochs: int | None = None) -> Run:
    run = Run(replace(config, step=step), CPU, tiny_dataset())
    for _ in range(epochs or config.epochs):
        run.finish_epoch(run.train_epoch(lambda: None))
    return run


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def assert_same(one: Run, other: Run) -> None:
    """Weights, buffers, the state of the optimizer, noise, and the figures of every epoch."""
    mine, theirs = one.net.state_dict(), other.net.state_dict()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert timeless(one.history) == timeless(other.history)
    assert same(one.trainer.state_dict(), other.trainer.state_dict())
    if one.beside is not None and other.beside is not None:
        assert same(one.beside.state_dict(), other.beside.state_dict())


def assert_recorded_as_eager(config: RunConfig, least: int) -> StepReport:
    recorded = trained(config, "auto")
    assert_same(recorded, trained(config, "eager"))
    report = recorded.trainer.step_report()
    assert report.replayed >= (least if TRACES_ALL else 0), report
    assert report.replayed + report.recorded + report.eager.total() == recorded.trainer.steps
    return report


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(objective: str, norm: str) -> None:
    """Twelve steps over three epochs with a validation after each; the learning rate decays twice."""
    config = replace(SHALLOW[norm], objective=objective, decay_epochs=(1, 2), gap_epochs=(0, 1), sat_start=1)
    if objective in ("fat", "ates"):  # which are recorded in training mode alone
        config = replace(config, patience=1, attack_mode="train")
    report = assert_recorded_as_eager(config, 6 if norm == "batch" else 9)
    assert report.recorded <= 1, "neither an epoch nor a learning rate makes a new kind of step"


@pytest.mark.parametrize("optimizer", ["msgd", "mgnc", "sngm", "f-engm", "n-engm", "a-engm"])
def test_every_optimizer(optimizer: str) -> None:
    assert_recorded_as_eager(replace(SHALLOW["group"], optimizer=optimizer, tau=6), 7)


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bf16"},
        {"alpha": "auto"},
        {"borrow": False},
        {"threat": "l2", "eps": 0.3},
        {"attack_mode": "eval"},
        {"ema": 0.5},
        {"eps": 0.0, "width": 4},
    ],
    ids=str,
)
def test_settings(change: dict[str, Any]) -> None:
    """Where a calibration judges borrowed norms otherwise than the one before, there are two kinds of steps."""
    assert_recorded_as_eager(replace(SHALLOW["batch"], **change), 3)


def resumed_at(steps: int, config: RunConfig) -> Run:
    """A run that was killed after so many steps, and one that goes on from its state."""
    first = Run(config, CPU, tiny_dataset())

    def stop() -> None:
        if first.trainer.steps == steps:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        while not first.over:
            first.finish_epoch(first.train_epoch(stop))
    assert first.trainer.steps == steps
    state = first.state_dict()
    again = Run(config, CPU, tiny_dataset())
    again.load_state_dict(state)
    while not again.over:
        again.finish_epoch(again.train_epoch(lambda: None))
    return again


@pytest.mark.parametrize("steps", [2, 5, 6, 11])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_resumed_run_records_again_and_ends_with_the_same_bits(steps: int, norm: str) -> None:
    config = replace(SHALLOW[norm], step="auto")
    assert_same(resumed_at(steps, config), trained(config, "eager"))


def small_trainer(step: str) -> Trainer:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    model = engm.GradNormModule(nn.Sequential(*layers), calibrate_every=7)
    sgd = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    return Trainer(model, engm.ENGM(model, sgd, 0.5), PGD(0.1, 0.03, 2), seed=5, step=step)


def test_a_smaller_last_batch_has_a_program_of_its_own() -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = [6, 6, 6, 4] * 5
    batches = [(torch.rand(n, 1, 4, 4, generator=generator), torch.randint(3, (n,))) for n in sizes]
    trainers = [small_trainer(step) for step in ("auto", "eager")]
    for each in trainers:
        for number, (x, y) in enumerate(batches, 1):
            each.step(x, y)
            if number % 4 == 0:
                assert len(each.finish_epoch().step_seconds) == 4
    for name, tensor in trainers[1].model.state_dict().items():
        assert torch.equal(trainers[0].model.state_dict()[name], tensor), name
    report = trainers[0].step_report()
    assert report.recorded == (2 if TRACES_ALL else 0), report
    assert trainers[1].step_report().replayed == 0


@pytest.mark.parametrize("perturbed", [False, True])
def test_losses_that_are_not_finite_stop_a_recorded_step(perturbed: bool) -> None:
    """And weights that were perturbed are put back."""
    trainer = small_trainer("auto")
    trainer.awp = AWP(trainer.model) if perturbed else None
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    for _ in range(5):
        trainer.step(x, y)
    with torch.no_grad():
        trainer.model.unwrap()[4].bias[0] = torch.nan
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(engm.checks.NonFiniteError, match="at step 6"):
        trainer.step(x, y)
    for parameter, kept in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(parameter.nan_to_num(7), kept.nan_to_num(7))


@needs_traced_draws
def test_a_radius_that_grows_runs_eagerly_and_says_so() -> None:
    config = replace(SHALLOW["group"], eps_warmup=2.0, epochs=4)
    report = assert_recorded_as_eager(config, 4)
    assert report.eager[CHANGING] == 8, "every step of two epochs, and the first with the whole radius"
    assert report.recorded == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"objective": "fat"}, "drop out of the attack's batch"),
        ({"objective": "ates"}, "drop out of the attack's batch"),
        ({"objective": "trades", "optimizer": "n-engm"}, "reads input gradients"),
    ],
)
def test_what_is_never_recorded_runs_eagerly_and_says_so(change: dict[str, Any], reason: str) -> None:
    config = replace(SHALLOW["group"], epochs=1, **change)
    run = trained(config, "auto")
    report = run.trainer.step_report()
    assert (report.replayed, report.recorded, report.eager.total()) == (0, 0, 4)
    assert reason in str(report)
    with pytest.warns(UserWarning, match=f"step='replay', but steps run without being recorded: .*{reason}") as said:
        asked = trained(config, "replay")
    assert len([warning for warning in said if "step='replay'" in str(warning.message)]) == 1
    assert_same(run, asked)


@needs_traced_draws
@pytest.mark.parametrize(
    ("objective", "norm"),
    [*product(("pgd", "trades", "mart"), ("batch", "group")), ("lbgat", "group"), ("self-adaptive", "group")],
)
def test_perturbed_weights(objective: str, norm: str) -> None:
    """AWP, from its warm-up on: the program perturbs the weights and puts them back."""
    config = replace(
        SHALLOW[norm], objective=objective, awp=True, awp_warmup=1, epochs=4, calibrate_every=50, sat_start=1
    )
    assert assert_recorded_as_eager(config, 4).recorded == 2


def test_an_optimizer_of_somebody_else_runs_eagerly() -> None:
    class Foreign(torch.optim.SGD):
        def backward(self, losses: torch.Tensor, inputs: Any = None, measurement: Any = None) -> engm.optim.StepStats:
            losses.mean().backward()
            return engm.optim.StepStats(losses.detach(), torch.ones(len(losses)))

    model = engm.GradNormModule(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
    trainer = Trainer(model, Foreign(model.parameters(), 0.1), PGD(0.1, 0.03, 2), objective=VANILLA)
    for _ in range(3):
        trainer.step(torch.rand(6, 1, 4, 4), torch.arange(6) % 3)
    assert trainer.step_report().eager == {"the optimizer is none of engm's": 3}


def test_a_backend_that_there_is_not_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--step"):
        replace(PLAIN, step="replya")
    with pytest.raises(ValueError, match="backend"):
        train(replace(PLAIN, step="cudagraph"), tmp_path / "run", CPU, dataset=tiny_dataset())
    assert not (tmp_path / "run").exists()


def test_a_run_says_how_its_steps_ran(tmp_path: Path) -> None:
    out = io.StringIO()
    config = replace(PLAIN, norm="group", step="auto")
    with warnings.catch_warnings(), RunView(Console(file=out, width=300)) as view:
        warnings.simplefilter("error")
        results = train(config, tmp_path / "run", CPU, view=view, dataset=tiny_dataset())
    lines = [line for line in out.getvalue().splitlines() if line.startswith("steps: ")]
    assert len(lines) == 2, "after the first epoch and at the end"
    assert results["steps"]["replayed"] + results["steps"]["recorded"] + sum(results["steps"]["eager"].values()) == 12
    if TRACES_ALL:
        assert lines[1].startswith("steps: 9 replayed, 1 recorded, 2 eager (")
    # Other ways to take steps go on with the run: the bits are the same.
    assert train(replace(config, step="eager"), tmp_path / "run", CPU, dataset=tiny_dataset()) == results
    assert RunFolder(tmp_path / "run").config().step == "auto"


def test_eager_runs_say_nothing_of_it(tmp_path: Path) -> None:
    out = io.StringIO()
    with RunView(Console(file=out, width=300)) as view:
        train(replace(PLAIN, epochs=1), tmp_path / "run", CPU, view=view, dataset=tiny_dataset())
    assert "steps: " not in out.getvalue()
