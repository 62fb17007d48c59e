"""Runs of objectives that change in training or keep things beside the network: their state, and what is evaluated."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import CPU, PLAIN, KilledAt, tiny_dataset, train_tiny

from engm.adversarial import Guide, LabelAverages, trades
from engm.recipes.config import RunConfig
from engm.recipes.data import Split
from engm.recipes.processes import Processes
from engm.recipes.runs.folder import RunFolder
from engm.recipes.training.batches import TrainingBatches
from engm.recipes.training.run import Run

NAMES = ("ates", "backward-smoothing", "lbgat", "self-adaptive")
CHANGES: dict[str, dict[str, Any]] = {"ates": {"gap_epochs": (0, 3)}, "self-adaptive": {"sat_start": 2}}


def configured(name: str, **options: Any) -> RunConfig:
    return replace(PLAIN, objective=name, **(CHANGES.get(name, {}) | options))


def trained(config: RunConfig) -> Run:
    run = Run(config, CPU, tiny_dataset())
    for _ in range(config.epochs):
        run.finish_epoch(run.train_epoch(lambda: None))
    return run


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"model": "shallow_networks:batch", "optimizer": "a-engm", "awp": True, "step": "auto"},
        {"norm": "group", "accumulate": 2},
    ],
    ids=["perturbed", "in parts"],
)
def test_a_run_that_was_killed_ends_with_the_same_bits(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Killed at step 7, a step after a checkpoint, within the second epoch; on disk all the while."""
    config = configured(name, epochs=2, **options)
    train_tiny(config, tmp_path / "whole")
    with suppress(KeyboardInterrupt):
        train_tiny(config, tmp_path / "killed", view=KilledAt(7))
    found = RunFolder(tmp_path / "killed").store.latest()
    assert found is not None
    assert found[0] == "step-00000006"
    train_tiny(config, tmp_path / "killed")
    flat, again = (states(tmp_path / path) for path in ("whole", "killed"))
    assert flat.keys() == again.keys()
    assert [path for path in flat if not torch.equal(flat[path], again[path])] == []
    kept = [path for path in flat if path.startswith("/beside")]
    assert bool(kept) == (name in ("lbgat", "self-adaptive"))


def states(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's last checkpoint, by their paths in it."""
    found = RunFolder(path).store.latest()
    assert found is not None
    assert found[0] == "step-00000008"
    return dict(leaves(found[1]))


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield path, tree
    for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from leaves(part, f"{path}/{key}")


def test_the_gap_of_ates_rises_with_the_epochs() -> None:
    run = Run(configured("ates", gap_first=-0.3, gap_last=0.9), CPU, tiny_dataset())
    seen = []
    for _ in range(3):
        run.finish_epoch(run.train_epoch(lambda: seen.append(run.trainer.attack.stop_gap)))
    assert seen == pytest.approx([0.1] * 4 + [0.5] * 4 + [0.9] * 4)


def test_backward_smoothing_takes_one_long_step() -> None:
    run = Run(configured("backward-smoothing", eps=0.2, attack_steps=7), CPU, tiny_dataset())
    attack = run.trainer.attack
    assert (attack.steps, attack.step_size, attack.eps) == (1, 0.2, 0.2)
    run = Run(configured("backward-smoothing", bs_steps=3, bs_gamma=0.5, step_size=0.1), CPU, tiny_dataset())
    assert (run.trainer.attack.steps, run.trainer.attack.gamma) == (3, 0.5)  # type: ignore[attr-defined]
    assert run.trainer.attack.step_size == 0.1


def test_the_guide_is_a_network_of_its_own_and_the_robust_one_is_evaluated() -> None:
    run = Run(configured("lbgat", beta=6.0), CPU, tiny_dataset())
    assert isinstance(run.beside, Guide)
    guide = run.beside.net
    assert not {id(p) for p in guide.parameters()} & {id(p) for p in run.net.parameters()}
    assert not torch.equal(next(guide.parameters()), next(run.net.parameters())), "not even of the same kind"
    assert {id(p) for p in run.trainer.model.parameters()} == {id(p) for p in run.net.parameters()}
    before = copy.deepcopy(guide.state_dict())
    run.finish_epoch(run.train_epoch(lambda: None))
    assert any(not torch.equal(before[name], tensor) for name, tensor in guide.state_dict().items())
    assert run.evaluated is run.net
    rates = {group["lr"] for group in [*run.beside.param_groups, *run.trainer.optimizer.param_groups]}
    assert len(rates) == 1
    assert run.state_dict()["net"].keys() == Run(PLAIN, CPU, tiny_dataset()).net.state_dict().keys()


def test_the_learning_rate_of_the_guide_follows_the_schedule() -> None:
    run = trained(configured("lbgat", decay_epochs=(1, 2), lr=0.04))
    assert run.beside is not None
    assert [group["lr"] for group in run.beside.param_groups] == pytest.approx([0.0004])


def test_a_guide_may_be_another_network() -> None:
    run = Run(configured("lbgat", guide="vgg8", width=4), CPU, tiny_dataset())
    assert isinstance(run.beside, Guide)
    assert type(run.beside.net) is not type(run.net)
    with pytest.raises(ValueError, match="unknown network: 'vgg9'"):
        Run(configured("lbgat", guide="vgg9"), CPU, tiny_dataset())


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"ema": 0.5}, {"normalize": "data"}], ids=str)
def test_what_else_a_run_does_goes_with_a_guide(options: dict[str, Any]) -> None:
    run = trained(configured("lbgat", epochs=2, **options))
    assert all(torch.tensor(row["loss"]).isfinite() for row in run.history)
    assert isinstance(run.beside, Guide)
    assert all(p.isfinite().all() for p in run.beside.net.parameters())


def test_labels_move_from_their_epoch_on() -> None:
    run = Run(configured("self-adaptive"), CPU, tiny_dataset())
    assert isinstance(run.beside, LabelAverages)
    sharp = F.one_hot(run.dataset.train.labels, 2).float()
    assert torch.equal(run.beside.values, sharp)
    run.finish_epoch(run.train_epoch(lambda: None))
    assert torch.equal(run.beside.values, sharp)
    before, seen = run.beside.values.clone(), torch.cat(list(run.batches.rows(1)))
    run.finish_epoch(run.train_epoch(lambda: None))
    moved = (run.beside.values != before).any(1)
    assert torch.equal(moved.nonzero().flatten(), seen.sort().values)
    assert not moved.all(), "an incomplete batch is left out"
    torch.testing.assert_close(run.beside.values.sum(1), torch.ones(68))


def test_labels_move_once_a_step_where_weights_are_perturbed() -> None:
    """The loss is then computed twice: to perturb, and at the perturbed weights."""
    options = {"sat_start": 1, "sat_momentum": 0.5, "epochs": 1, "lr": 1e-9, "norm": "group", "awp_gamma": 1e-6}
    found = [trained(configured("self-adaptive", awp=awp, **options)).beside for awp in (False, True)]
    plain, perturbed = (each.values for each in found if isinstance(each, LabelAverages))
    torch.testing.assert_close(perturbed, plain, rtol=1e-3, atol=1e-4)
    assert (plain.amax(1) < 0.9).sum() == 64


def test_before_its_labels_move_it_is_trades() -> None:
    one, other = (trained(configured(name, epochs=2, sat_start=3)) for name in ("self-adaptive", "trades"))
    for (name, tensor), same in zip(one.net.state_dict().items(), other.net.state_dict().values(), strict=True):
        assert torch.equal(tensor, same), name
    x, y = one.dataset.train.batch(torch.arange(4))
    torch.testing.assert_close(one.trainer.objective.losses(one.net, x, x, y), trades(one.net, x, x, y))


@pytest.mark.parametrize("extra", [False, True])
def test_every_example_is_told_by_its_row(extra: bool) -> None:
    numbers = Split(torch.rand(40, 1, 2, 2), torch.arange(40))
    more = Split(torch.rand(25, 1, 2, 2), torch.arange(40, 65))
    options = {"extra": more, "extra_fraction": 0.3} if extra else {}
    nothing = tiny_dataset().augment.__class__()
    for processes in (CPU, Processes(torch.device("cpu"), 1, 2)):
        batches = TrainingBatches(numbers, 10, nothing, 3, processes, **options)
        for start in (0, 2):
            for (_, y), rows in zip(batches.epoch(1, start), batches.rows(1, start), strict=True):
                assert torch.equal(y, rows)


def test_extra_examples_have_labels_that_move_too() -> None:
    dataset = tiny_dataset()
    dataset = replace(dataset, extra=dataset.validation)
    config = configured("self-adaptive", sat_start=1, epochs=1, extra_fraction=0.5)
    run = Run(config, CPU, dataset)
    assert isinstance(run.beside, LabelAverages)
    assert run.beside.values.shape == (68 + 14, 2)
    run.finish_epoch(run.train_epoch(lambda: None))
    assert (run.beside.values[68:].amax(1) < 1).any()


@pytest.mark.parametrize("name", ["lbgat", "self-adaptive"])
def test_steps_that_tell_no_rows_are_taken(name: str) -> None:
    """As where a step is timed; nothing is remembered of such examples."""
    run = Run(configured(name, sat_start=1), CPU, tiny_dataset())
    before = copy.deepcopy(run.beside.state_dict()) if name == "self-adaptive" and run.beside else None
    run.begin_epoch()
    for x, y in run.batches.epoch(0):
        run.trainer.step(x, y)
    assert run.trainer.steps == 4
    if before is not None and run.beside is not None:
        assert torch.equal(before["values"], run.beside.state_dict()["values"])
