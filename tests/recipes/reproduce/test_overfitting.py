"""A verdict on robust overfitting shows best and last, and is not for runs whose last checkpoint is worse."""

from __future__ import annotations

import pytest

from engm.recipes.accuracy import overfit
from engm.recipes.reproduce import analysis
from engm.recipes.reproduce.accuracy_tables import less_overfitting_finding
from engm.recipes.reproduce.statistics import Record


def record(optimizer: str, seed: int, best: float, last: float) -> Record:
    return {
        "labels": {"optimizer": optimizer, "seed": seed},
        "test": {"best": {"natural": 0.5, "robust": best}, "last": {"natural": 0.5, "robust": last}},
        "overfit": overfit(best, last),
    }


def records(engm: list[tuple[float, float]], msgd: list[tuple[float, float]]) -> list[Record]:
    return [
        record(name, seed, *pair) for name, pairs in (("engm", engm), ("msgd", msgd)) for seed, pair in enumerate(pairs)
    ]


MSGD = [(0.23, 0.20), (0.24, 0.205), (0.22, 0.19)]


@pytest.mark.parametrize(
    ("engm", "verdict", "last"),
    [
        ([(0.19, 0.182), (0.20, 0.191), (0.18, 0.175)], "cannot say", "18.3 against 19.8 %: the last checkpoint is"),
        ([(0.23, 0.222), (0.24, 0.231), (0.22, 0.215)], "agrees", "22.3 against 19.8 %"),
        ([(0.35, 0.20), (0.36, 0.21), (0.34, 0.195)], "contradicts", "20.2 against 19.8 %"),
    ],
)
def test_both_columns_decide(engm: list[tuple[float, float]], verdict: str, last: str) -> None:
    finding = less_overfitting_finding("less", records(engm, MSGD), {"optimizer": "engm"}, {"optimizer": "msgd"})
    assert finding.verdict == verdict
    assert f"last {last}" in finding.measured
    assert "against 23.0 %" in finding.measured.split("best ")[1]


def test_table2_says_so_of_every_optimizer() -> None:
    made = records([(0.19, 0.182), (0.20, 0.191), (0.18, 0.175)], MSGD)
    for r in made:
        r |= {"data": {"test": 100}, "measured_on": {}, "history": [], "config": {"decay_epochs": []}}
    claims = [f for f in analysis("table2").summarise(made).findings if "overfits less" in f.claim]
    assert [f.verdict for f in claims] == ["cannot say"]
    assert "best 19.0 against 23.0 %, last 18.3 against 19.8 %" in claims[0].measured
