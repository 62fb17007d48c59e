"""Set-ups: what the methods' authors published reaches the runs of Tables 3 and 4, and what users say goes before."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

import engm
from engm.recipes.config import RunConfig
from engm.recipes.models import build_model
from engm.recipes.reproduce import Request, analysis, budget
from engm.recipes.reproduce.cells import Cell
from engm.recipes.reproduce.published import TABLE4
from engm.recipes.reproduce.wide_table import SYSTEMS, row_of
from engm.recipes.setups import SETUPS, printed_alpha
from engm.recipes.training.optimizer import paper_optimizer


def rows(name: str, budget_name: str = "paper", **settings: object) -> dict[tuple[str, str], Cell]:
    """The cells of the first data set by method and optimizer."""
    found = analysis(name).cells(Request(budget(budget_name), settings, (0,)))
    return {(c.labels["method"], c.labels["optimizer"]): c for c in reversed(found)}


@pytest.mark.parametrize(
    ("method", "lr", "weight_decay", "warmup"),
    [("vanilla", 0.1, 5e-4, 0), ("trades", 0.1, 2e-4, 0), ("mart", 0.01, 3.5e-3, 0), ("awp", 0.1, 5e-4, 10)],
)
def test_table_3_takes_what_the_authors_took(method: str, lr: float, weight_decay: float, warmup: int) -> None:
    for name, threat, eps in (("table3", "linf", 8 / 255), ("table3-l2", "l2", 128 / 255)):
        for optimizer in ("msgd", "engm"):
            config = rows(name)[method, optimizer].config.resolved()
            assert (config.lr, config.weight_decay, config.awp_warmup) == (lr, weight_decay, warmup)
            assert (config.epochs, config.decay_epochs, config.beta) == (200, (100, 150), 6.0)
            assert (config.threat, config.eps) == (threat, eps)


def test_steps_of_l2_attacks_are_as_published() -> None:
    found = rows("table3-l2")
    assert found["vanilla", "msgd"].config.resolved().step_size == pytest.approx(15 / 255)
    assert found["trades", "msgd"].config.resolved().step_size == pytest.approx(2 * 128 / 255 / 10)


def test_table_4_has_the_authors_lengths_and_the_printed_threshold() -> None:
    found = rows("table4")
    lengths = {method: (c.config.epochs, c.config.decay_epochs) for (method, o), c in found.items() if o == "msgd"}
    assert lengths["fat"] == (120, (59, 89))
    assert lengths["trades"] == (76, (74,))
    assert lengths["awp"] == (200, (100, 150))
    assert lengths["ates"] == (100, (40, 60, 80))
    assert lengths["bs"] == (100, (50, 75))
    assert found["ates", "msgd"].config.lr == 0.05
    assert found["bs", "msgd"].config.resolved().beta == 10.0
    mart = found["mart", "msgd"].config  # whose authors have another file for wide networks
    assert (mart.lr, mart.weight_decay, mart.epochs) == (0.1, 2e-4, 76)
    assert found["fat", "msgd"].config.weight_decay == 2e-4
    assert {c.config.alpha for c in found.values()} == {"paper"}
    assert {c.config.model for c in found.values()} == {"wrn-34-10"}


def test_budgets_leave_a_method_its_own_step() -> None:
    for budget_name in ("small", "paper"):
        config = rows("table4", budget_name)["bs", "msgd"].config.resolved()
        assert (config.attack_steps, config.step_size) == (1, config.eps)
    assert rows("table4", "small")["trades", "msgd"].config.resolved().step_size == pytest.approx(0.4 * 8 / 255)


def test_warm_ups_are_shares_of_the_length_and_what_users_say_goes_before() -> None:
    assert rows("table3", "small")["awp", "engm"].config.awp_warmup == 2
    assert rows("table3", epochs=100)["awp", "engm"].config.awp_warmup == 5
    assert rows("table3", awp_warmup=3)["awp", "engm"].config.awp_warmup == 3
    assert rows("table3", lr=0.05)["mart", "msgd"].config.lr == 0.05
    shorter = rows("table4", epochs=40)["fat", "msgd"].config.resolved()
    assert (shorter.epochs, shorter.decay_epochs) == (40, (25, 30))
    small = rows("table4", "small")["fat", "msgd"].config
    assert (small.epochs, small.weight_decay) == (30, 2e-4)


def test_every_number_is_a_setting_and_has_a_source() -> None:
    known = {f.name for f in fields(RunConfig)}
    for setup in SETUPS.values():
        for published in (*setup.published, *setup.length):
            assert published.setting in known
            assert len(published.source) > 20
    assert {system.setup for system in SYSTEMS.values()} <= SETUPS.keys()
    assert {method for method, _ in TABLE4} == SYSTEMS.keys()


@pytest.mark.parametrize(
    ("model", "optimizer", "alpha", "expected"),
    [
        ("resnet18", "engm", "paper", 5.0),
        ("resnet18", "n-engm", "paper", 0.5),
        ("wrn-34-10", "engm", "paper", 10.4),
        ("wrn-34-10", "a-engm", "paper", 10.4),
        ("wrn-34-10", "n-engm", "paper", 1.04),
        ("wrn-34-10", "engm", "7.5", 7.5),
    ],
)
def test_thresholds_by_name(model: str, optimizer: str, alpha: str, expected: float) -> None:
    assert threshold(model, optimizer, alpha) == pytest.approx(expected)


def test_a_threshold_that_nobody_printed_is_scaled() -> None:
    net = build_model("wrn-10-1", classes=10)
    assert threshold("wrn-10-1", "engm", "paper") == threshold("wrn-10-1", "engm", "scaled") == engm.alpha_for(net)
    assert printed_alpha("WRN_34_10", None, "engm") == 10.4
    assert printed_alpha("wrn-34-10", 8, "engm") is None


def threshold(model: str, optimizer: str, alpha: str) -> float:
    """The threshold that a run would have, on a small network: the name of the printed one's is what counts."""
    wrapped = engm.GradNormModule(build_model("wrn-10-1", classes=10))
    config = RunConfig(data="cifar10", model=model, optimizer=optimizer, alpha=alpha)
    made = paper_optimizer(config, wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1))
    return float(made.alpha)  # type: ignore[attr-defined]


@pytest.mark.parametrize("row", [f"{method}-{optimizer}" for method, optimizer in TABLE4])
def test_every_system_of_table_4_is_a_row(row: str) -> None:
    method = row.split("-")[0]
    (cell,) = analysis("table4").wanted(Request(budget("smoke"), {}, (0,), rows=(row,)))
    assert row_of(cell.labels) == row
    assert cell.config.objective == SETUPS[SYSTEMS[method].setup].chosen["objective"]
