"""Batches that are taken in parts: the update of the whole batch, its figures, and recorded parts to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_runs import PLAIN, tiny_dataset

from engm.recipes.config import RunConfig
from engm.recipes.methods import METHOD_NAMES
from engm.recipes.processes import Processes
from engm.recipes.training.run import Run

CPU = Processes(torch.device("cpu"))
# Nothing couples the examples, and the attack starts at the example itself: parts are then attacked as the whole is.
APART = replace(PLAIN, norm="group", alpha="2", epochs=1, eps=0.0, lr=0.02, seed=1)


def trained(config: RunConfig) -> Run:
    run = Run(config, CPU, tiny_dataset())
    while not run.over:
        run.finish_epoch(run.train_epoch(lambda: None))
    return run


def weights(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.net.parameters()])


@pytest.mark.parametrize("optimizer", METHOD_NAMES)
def test_parts_make_the_update_of_the_whole_batch(optimizer: str) -> None:
    alpha = "paper" if optimizer in ("msgd", "sngm", "mgnc", "f-engm") else "0.5"
    config = replace(APART, optimizer=optimizer, alpha=alpha, max_norm=0.1)
    whole, parts = trained(config), trained(replace(config, accumulate=4))
    if optimizer != "a-engm":  # whose regression is on the examples of a part
        torch.testing.assert_close(weights(parts), weights(whole), rtol=2e-4, atol=2e-5)
        for name in ("loss", "weight_mean", "clipped"):
            assert parts.history[0][name] == pytest.approx(whole.history[0][name], rel=1e-3, abs=1e-6), name
    assert parts.trainer.steps == whole.trainer.steps == 4


def test_every_part_is_attacked_by_itself() -> None:
    run = Run(replace(APART, eps=0.2, accumulate=2), CPU, tiny_dataset())
    attack, sizes = run.trainer._losses.attacked, []

    def spy(x: torch.Tensor, y: torch.Tensor) -> Any:
        sizes.append(len(x))
        return attack(x, y)

    run.trainer._losses.attacked = spy  # type: ignore[method-assign]
    run.train_epoch(lambda: None)
    assert sizes == [8] * 8


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_recorded_parts_have_the_bits_of_eager_ones(norm: str) -> None:
    config = replace(PLAIN, model=f"shallow_networks:{norm}", accumulate=2, attack_steps=1, epochs=2)
    eager, recorded = trained(replace(config, step="eager")), trained(replace(config, step="auto"))
    assert torch.equal(weights(recorded), weights(eager))
    report = recorded.trainer.step_report()
    assert report.replayed > 0
    assert report.replayed + report.eager.total() + report.recorded == 2 * recorded.trainer.steps


def test_intervals_are_in_batches() -> None:
    run = Run(replace(PLAIN, accumulate=4, optimizer="a-engm", tau=3), CPU, tiny_dataset())
    assert run.trainer.model.calibration.every == 4 * PLAIN.calibrate_every
    assert run.trainer.optimizer.tau == 12  # type: ignore[attr-defined]


def test_parts_have_to_be_equal() -> None:
    with pytest.raises(ValueError, match="--accumulate 3: a process's 16 examples of a batch cannot be taken in so"):
        Run(replace(PLAIN, accumulate=3), CPU, tiny_dataset())
    with pytest.raises(ValueError, match="--accumulate must be at least 1"):
        RunConfig(accumulate=0)
