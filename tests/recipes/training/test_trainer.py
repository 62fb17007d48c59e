"""A trainer's steps: same data and noise for every trainer, every method, figures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import engm
from engm.adversarial import PGD, evaluation_mode, vanilla
from engm.recipes.config import RunConfig
from engm.recipes.data import Split
from engm.recipes.methods import METHOD_NAMES
from engm.recipes.training.optimizer import paper_optimizer
from engm.recipes.training.step_figures import StepFigures
from engm.recipes.training.trainer import EpochRecord, Trainer
from engm.recipes.training.turns import take_turns

ATTACK = PGD(0.1, 0.03, 3)


@pytest.fixture
def split() -> Split:
    generator = torch.Generator().manual_seed(3)
    return Split(torch.rand(20, 1, 4, 4, generator=generator), torch.randint(3, (20,), generator=generator))


def network(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3))


class Rows:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, dict[str, float | None]]] = []

    def log(self, kind: str, index: int, figures: Mapping[str, float | None]) -> None:
        self.rows.append((kind, index, dict(figures)))

    def close(self) -> None:
        pass


def trainer(make: Callable[..., torch.optim.Optimizer], norm: bool = True, **options: Any) -> Trainer:
    model = engm.GradNormModule(network(norm))
    sgd = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=5e-4)
    return Trainer(model, make(model, sgd), ATTACK, seed=5, **options)


def engm_of(alpha: float) -> Callable[..., torch.optim.Optimizer]:
    return lambda model, sgd: engm.ENGM(model, sgd, alpha)


def order(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train_epoch(trainers: Sequence[Trainer], split: Split, generator: torch.Generator) -> list[EpochRecord]:
    """Two batches of 8, by all trainers in turn."""
    for each in trainers:
        each.model.train()
    rows = torch.randperm(len(split), generator=generator)[:16]
    for _ in take_turns(trainers, split.batches(rows.split(8))):
        pass
    return [each.finish_epoch() for each in trainers]


def test_msgd_is_the_loop_that_anybody_would_write(split: Split) -> None:
    trained = trainer(engm.MSGD)
    train_epoch([trained], split, generator=order())
    net = network()
    sgd = torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=5e-4)
    noise = torch.Generator().manual_seed(5)
    rows = torch.randperm(20, generator=order())
    for batch in (rows[:8], rows[8:16]):
        x, y = split.inputs[batch], split.labels[batch]
        net.train()
        with evaluation_mode(net):
            x_adv = (x + (2 * torch.rand(x.shape, generator=noise) - 1) * 0.1).clamp(x - 0.1, x + 0.1).clamp(0, 1)
            for _ in range(3):
                x_adv.requires_grad_()
                (gradient,) = torch.autograd.grad(vanilla(net, x_adv, y).sum(), x_adv)
                x_adv = (x_adv.detach() + 0.03 * gradient.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
        vanilla(net, x_adv, y).mean().backward()
        sgd.step()
        sgd.zero_grad()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(trained.model.state_dict()[name], tensor, msg=name)


def test_interleaving_changes_nothing(split: Split) -> None:
    alone, first, second = (trainer(engm_of(0.5)) for _ in range(3))
    train_epoch([alone], split, generator=order())
    train_epoch([first, trainer(engm.MSGD), second], split, generator=order())
    for name, tensor in alone.model.state_dict().items():
        assert torch.equal(first.model.state_dict()[name], tensor), name
        assert torch.equal(second.model.state_dict()[name], tensor), name


def test_another_trainer_goes_first_with_every_batch(split: Split) -> None:
    class Taker:
        def __init__(self, name: str) -> None:
            self.name = name

        def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
            taken.append((self.name, y.tolist()))

    taken: list[tuple[str, list[int]]] = []
    batches = list(split.batches(torch.arange(20).split(5)))
    turns = [len(taken) for _ in take_turns([Taker("a"), Taker("b"), Taker("c")], batches)]
    assert turns == [3, 6, 9, 12], "a batch is everybody's before the next"
    assert "".join(name for name, _ in taken) == "abcbcacababc"
    assert [y for _, y in taken[::3]] == [y.tolist() for _, y in batches]


def test_a_huge_threshold_recovers_msgd(split: Split) -> None:
    loose, plain = trainer(engm_of(1e6)), trainer(engm.MSGD)
    records = train_epoch([loose, plain], split, generator=order())
    for name, tensor in plain.model.state_dict().items():
        torch.testing.assert_close(loose.model.state_dict()[name], tensor, msg=name)
    assert [record.fraction_clipped for record in records] == [0, 0]
    assert [record.mean_weight for record in records] == [1, 1]


def test_borrowed_norms_are_those_before_the_last_attack_step(split: Split) -> None:
    """Without coupling the borrowed norms are exact ones, of the penultimate example."""
    borrowing, paying = (trainer(engm_of(0.3), norm=False, borrow=borrow) for borrow in (True, None))
    x, y = split.inputs[:8], split.labels[:8]
    borrowing.step(x, y)
    paying.step(x, y)
    model = engm.GradNormModule(network(norm=False))
    points = {}
    for steps in (2, 3):
        x_adv = PGD(0.1, 0.03, steps)(model, x, y, generator=order(5)).inputs
        points[steps] = engm.naive_grad_norms(model, vanilla(model, x_adv, y)).mean().item()
    assert borrowing.finish_epoch().mean_norm == pytest.approx(points[2], rel=1e-5)
    assert paying.finish_epoch().mean_norm == pytest.approx(points[3], rel=1e-5)


@pytest.mark.parametrize("borrow", [False, True])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_of_the_paper_trains(split: Split, method: str, borrow: bool) -> None:
    config = RunConfig(optimizer=method, alpha="0.05", max_norm=0.1, tau=10)
    trained = trainer(lambda model, sgd: paper_optimizer(config, model, sgd), borrow=borrow)
    before = copy.deepcopy(trained.model.state_dict())
    (record,) = train_epoch([trained], split, generator=order())
    assert all(torch.isfinite(tensor).all() for tensor in trained.model.state_dict().values())
    assert not torch.equal(trained.model.state_dict()["0.weight"], before["0.weight"])
    assert (record.mean_weight == 1) == (method in ("msgd", "mgnc", "sngm"))
    assert ("gradient_norm" in record.summary) == (method in ("mgnc", "sngm"))


@pytest.mark.parametrize("borrow", [False, True])
@pytest.mark.parametrize("method", ["AENGM", "NENGM", "ENGM"])
def test_every_method_weighs(split: Split, method: str, borrow: bool) -> None:
    trained = trainer(lambda model, sgd: getattr(engm, method)(model, sgd, 0.05), borrow=borrow)
    (record,) = train_epoch([trained], split, generator=order())
    assert 0 < record.mean_weight < 1
    assert record.fraction_clipped > 0
    assert record.mean_norm is not None
    assert record.mean_norm > 0
    assert len(record.step_seconds) == 2
    assert min(record.step_seconds) > 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="log_every must be at least 1, got 0"):
        trainer(engm.MSGD, log_every=0)
    with pytest.raises(RuntimeError, match="no step"):
        trainer(engm.MSGD).finish_epoch()


@pytest.mark.parametrize("log_every", [None, 1, 2, 3])
def test_the_logger_gets_every_step_and_epoch_once(split: Split, log_every: int | None) -> None:
    rows = Rows()
    trained = trainer(engm_of(0.05), logger=rows, log_every=log_every)
    records = []
    for epoch in (1, 2):
        records += train_epoch([trained], split, generator=order(epoch))
        trained.log_epoch(epoch, records[-1], {"natural": 0.5, "robust": 0.25} if epoch == 2 else None)
    places = [(kind, index) for kind, index, _ in rows.rows]
    assert places == [("step", 1), ("step", 2), ("epoch", 1), ("step", 3), ("step", 4), ("epoch", 2)]
    steps = [figures for kind, _, figures in rows.rows if kind == "step"]
    first, second = (figures for kind, _, figures in rows.rows if kind == "epoch")
    assert first["loss"] == records[0].loss == pytest.approx((steps[0]["loss"] + steps[1]["loss"]) / 2)
    assert first["norm_max"] == max(steps[0]["norm_max"], steps[1]["norm_max"])
    assert [figures["seconds"] for figures in steps] == records[0].step_seconds + records[1].step_seconds
    assert (first["robust"], second["natural"], second["robust"]) == (None, 0.5, 0.25)
    assert list(first) == list(second), "one set of columns"
    assert {figures["lr"] for figures in (*steps, first, second)} == {0.05}


@pytest.mark.parametrize(("log_every", "looks"), [(None, 1), (1, 3), (2, 2)])
def test_figures_are_fetched_only_when_written(
    split: Split, monkeypatch: pytest.MonkeyPatch, log_every: int | None, looks: int
) -> None:
    fetched = []
    take = StepFigures.take
    monkeypatch.setattr(StepFigures, "take", lambda figures: fetched.append(1) or take(figures))
    trained = trainer(engm_of(0.05), logger=Rows(), log_every=log_every)
    train_epoch([trained], split, generator=order())
    assert len(fetched) == looks


def test_logging_changes_nothing(split: Split) -> None:
    quiet, logged = trainer(engm_of(0.05)), trainer(engm_of(0.05), logger=Rows(), log_every=1)
    one, other = (train_epoch([each], split, generator=order())[0] for each in (quiet, logged))
    assert one.summary == other.summary
    for name, tensor in quiet.model.state_dict().items():
        assert torch.equal(logged.model.state_dict()[name], tensor), name
