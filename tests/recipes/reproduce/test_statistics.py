"""Means, intervals and verdicts, against scipy."""

from __future__ import annotations

from math import isnan

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from engm.recipes.reproduce.statistics import Mean, by_seed, figure, mean_of, paired_finding

NUMBERS = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))


def records(kind: str, values: list[float], first_seed: int = 0) -> list[dict]:
    return [
        {"labels": {"kind": kind, "seed": seed}, "score": value} for seed, value in enumerate(values, start=first_seed)
    ]


@given(st.lists(NUMBERS, min_size=2, max_size=9, unique=True))
def test_the_interval_is_students(values: list[float]) -> None:
    mean = Mean.of(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=stats.tmean(values), scale=stats.sem(values))
    assert mean.value - mean.half_width == pytest.approx(low, abs=1e-9)
    assert mean.value + mean.half_width == pytest.approx(high, abs=1e-9)


def test_one_run_has_no_interval() -> None:
    assert Mean.of([3.0]).value == 3.0
    assert isnan(Mean.of([3.0]).half_width)
    assert Mean.of([3.0]).text() == "3.0"
    assert Mean.of([]).text() == "-"
    assert Mean.of([1.0, 3.0]).text(scale=100) == "200.0 ± 141.4"


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=6), st.sampled_from(["greater", "less"]))
def test_the_verdict_is_that_of_a_paired_t_test(pairs: list[tuple[float, float]], expected: str) -> None:
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    differences = {round(a - b, 9) for a, b in pairs}
    made = records("ours", ours) + records("theirs", theirs)
    finding = paired_finding("more", made, {"kind": "ours"}, {"kind": "theirs"}, figure("score"), expected=expected)
    if len(differences) == 1:  # scipy has no answer, and neither have we
        assert finding.verdict == "cannot say"
        return
    test = stats.ttest_rel(ours, theirs)
    if abs(test.pvalue - 0.05) < 1e-9:
        return
    decided = test.pvalue < 0.05
    holds = (test.statistic > 0) == (expected == "greater")
    assert finding.verdict == (("agrees" if holds else "contradicts") if decided else "cannot say")


def test_only_seeds_that_both_have_are_paired() -> None:
    made = records("ours", [1.0, 2.0, 3.0]) + records("theirs", [0.0, 0.0, 0.0], first_seed=2)
    finding = paired_finding("more", made, {"kind": "ours"}, {"kind": "theirs"}, figure("score"), expected="greater")
    assert finding.verdict == "cannot say"
    assert "3.0 against 0.0" in finding.measured
    assert "one pair" in finding.measured


def test_diverged_runs_are_in_no_mean() -> None:
    made = records("ours", [1.0, 2.0])
    made[0]["diverged"] = "at step 3"
    assert by_seed(made, {"kind": "ours"}, figure("score")) == {1: 2.0}
    assert mean_of(made, {"kind": "ours"}, figure("score")).n == 1
    nobody = paired_finding("more", made, {"kind": "ours"}, {"kind": "x"}, figure("score"), expected="less")
    assert nobody.verdict == "cannot say"


def test_a_figure_that_is_not_there_is_none() -> None:
    assert figure("test", "best", "robust")({"test": {"best": None}}) is None
    assert figure("score")({"score": 0}) == 0.0
