"""Learning rates step by step, against torch's own schedulers, and in runs whose steps are recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_runs import PLAIN, tiny_dataset
from torch.optim import SGD, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from engm.recipes.config import RunConfig
from engm.recipes.processes import Processes
from engm.recipes.training.run import Run
from engm.recipes.training.schedule import Schedule

CPU = Processes(torch.device("cpu"))
LR, EPOCHS, STEPS = 0.3, 8, 5
WHOLE = EPOCHS * STEPS
ORACLES: dict[str, Callable[[SGD], LRScheduler]] = {
    "steps": lambda sgd: lr_scheduler.MultiStepLR(sgd, [3 * STEPS, 6 * STEPS]),
    "constant": lambda sgd: lr_scheduler.ConstantLR(sgd, 1.0),
    "linear": lambda sgd: lr_scheduler.LinearLR(sgd, 1.0, 0.0, WHOLE),
    "cosine": lambda sgd: lr_scheduler.CosineAnnealingLR(sgd, WHOLE),
    "cyclic": lambda sgd: lr_scheduler.CyclicLR(sgd, 0.0, LR, 2 * WHOLE // 5, 3 * WHOLE // 5, cycle_momentum=False),
    "one-cycle": lambda sgd: lr_scheduler.OneCycleLR(sgd, LR, WHOLE, cycle_momentum=False),
}


def torchs(make: Callable[[SGD], LRScheduler], steps: int) -> list[float]:
    sgd = SGD([torch.nn.Parameter(torch.zeros(1))], LR)
    scheduler, found = make(sgd), []
    for _ in range(steps):
        found.append(float(sgd.param_groups[0]["lr"]))
        sgd.step()
        scheduler.step()
    return found


def ours(config: RunConfig) -> list[float]:
    schedule = Schedule(config.resolved(), STEPS)
    return [schedule.lr(epoch, batch) for epoch in range(config.epochs) for batch in range(STEPS)]


@pytest.mark.parametrize("name", ORACLES)
def test_every_schedule_is_torchs(name: str) -> None:
    config = RunConfig(schedule=name, lr=LR, epochs=EPOCHS, decay_epochs=(3, 6) if name == "steps" else None)
    assert ours(config) == pytest.approx(torchs(ORACLES[name], WHOLE), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", ["steps", "constant", "linear", "cosine"])
def test_after_the_warm_up_a_schedule_takes_the_rest_of_the_run(name: str) -> None:
    warm = 2 * STEPS
    after: dict[str, Callable[[SGD], LRScheduler]] = {
        **ORACLES,
        "steps": lambda sgd: lr_scheduler.MultiStepLR(sgd, [1 * STEPS, 4 * STEPS]),
        "linear": lambda sgd: lr_scheduler.LinearLR(sgd, 1.0, 0.0, WHOLE - warm),
        "cosine": lambda sgd: lr_scheduler.CosineAnnealingLR(sgd, WHOLE - warm),
    }
    config = RunConfig(
        schedule=name, lr=LR, epochs=EPOCHS, warmup=2.0, decay_epochs=(3, 6) if name == "steps" else None
    )
    rise = torchs(lambda sgd: lr_scheduler.LinearLR(sgd, 1 / warm, 1.0, warm - 1), warm)
    assert ours(config) == pytest.approx(rise + torchs(after[name], WHOLE - warm), rel=1e-9, abs=1e-12)


def test_one_cycle_of_few_steps() -> None:
    for epochs in (1, 2, 3):
        schedule = Schedule(RunConfig(schedule="one-cycle", lr=LR, epochs=epochs), 1)
        rates = [schedule.lr(epoch) for epoch in range(epochs)]
        assert all(0 < rate <= LR for rate in rates), rates


def test_the_schedule_of_a_longer_run_is_what_was_planned() -> None:
    short, long = RunConfig(epochs=8), RunConfig(epochs=20, schedule_epochs=8)
    assert long.resolved().decay_epochs == short.resolved().decay_epochs
    for epoch in range(8):
        assert Schedule(long, 5).patience(epoch) == Schedule(short, 5).patience(epoch)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "cosin"}, "unknown --schedule: 'cosin'; did you mean cosine"),
        ({"schedule": "cyclic", "warmup": 1.0}, "--schedule cyclic begins with a rise of its own"),
        ({"warmup": 4.0, "epochs": 4}, "--warmup 4 takes all of the 4 epochs"),
        ({"schedule": "cosine", "epochs": 9, "schedule_epochs": 5}, "with --schedule-epochs 9 it goes on to the end"),
    ],
)
def test_what_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(**values)  # type: ignore[arg-type]


def test_every_step_has_its_rate_and_recorded_steps_go_on_with_it() -> None:
    """Eager and recorded runs have the same bits, and log the same rates, of every step its own."""

    class Rates:
        def __init__(self) -> None:
            self.steps: list[float | None] = []
            self.epochs: list[float | None] = []

        def log(self, kind: str, index: int, figures: dict[str, float | None]) -> None:
            getattr(self, f"{kind}s").append(figures["lr"])

        def close(self) -> None:
            pass

    def trained(step: str) -> tuple[Run, Rates]:
        config = replace(PLAIN, norm="group", schedule="cosine", warmup=0.5, step=step, lr=0.05)
        run, rates = Run(config, CPU, tiny_dataset()), Rates()
        run.trainer.logger = rates  # type: ignore[assignment]
        while not run.over:
            run.finish_epoch(run.train_epoch(lambda: None))
        return run, rates

    (eager, plain), (recorded, logged) = trained("eager"), trained("auto")
    schedule = eager.schedule
    expected = [schedule.lr(step // 4, step % 4) for step in range(12)]
    assert plain.steps == logged.steps == expected
    assert len(set(expected)) >= 10, "a rate of its own for nearly every step"
    assert plain.epochs == [row["lr"] for row in eager.history] == expected[3::4]
    for name, tensor in eager.net.state_dict().items():
        assert torch.equal(recorded.net.state_dict()[name], tensor), name
    report = recorded.trainer.step_report()
    assert report.recorded <= 1, "a learning rate makes no new kind of step"


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_a_warm_up_that_rounds_to_the_whole_run(name: str) -> None:
    config = RunConfig(schedule=name, lr=LR, epochs=1, warmup=0.95)
    assert all(0 <= lr <= LR for lr in ours(config))
