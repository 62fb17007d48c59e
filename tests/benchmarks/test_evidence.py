"""The evidence experiment: its plan goes through its stages, its page says what the records say and no more."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EVIDENCE = Path(__file__).resolve().parents[2] / "benchmarks" / "evidence"
sys.path.insert(0, str(EVIDENCE))

import data  # noqa: E402
import page  # noqa: E402
import plan  # noqa: E402
import regime  # noqa: E402
import run  # noqa: E402

from engm.recipes.reproduce.statistics import Mean  # noqa: E402

Effect = dict[str, float]


def record_of(trial: plan.Trial, effect: Effect) -> dict[str, Any]:
    """What a run might have come to: noise of the seed, which pairs share, and a method's own effect."""
    lr = dict(trial.setting)["lr"]
    base = 0.2 - 0.05 * abs(np.log10(lr) + 1) + 0.003 * trial.seed % 0.01
    last = base + effect.get(trial.method, 0.0) + 0.0003 * ((trial.seed * 7 + len(trial.method)) % 5)
    history = [{"epoch": e, "robust": r, "weight_mean": 0.5} for e, r in ((1, 0.1), (2, base + 0.03), (3, last))]
    look = {"natural": 0.3, "robust": last}
    return {
        "name": trial.name,
        "labels": trial.cell(Path("evidence.npz")).labels,
        "history": history,
        "test": {"best": {"natural": 0.3, "robust": base + 0.03}, "last": look} if trial.seed < 100 else {},
        "overfit": (base + 0.03 - last) / (base + 0.03),
        "measures": {"autoattack": 0.1, "autoattack_last": last / 2} if trial.autoattack else {},
        "config": {"decay_epochs": [2]},
        "seconds": 60.0,
    }


def carried_out(effect: Effect, stages: int = 100) -> dict[str, Any]:
    records: dict[str, Any] = {}
    for _ in range(stages):
        trials = plan.next_trials(records)
        if not trials:
            break
        names = [trial.name for trial in trials]
        assert len(set(names)) == len(names)
        records |= {trial.name: record_of(trial, effect) for trial in trials}
    return records


def test_the_plan_goes_through_its_stages_to_an_end() -> None:
    records = carried_out({"engm": 0.02})
    methods = {record["labels"]["method"] for record in records.values()}
    assert methods == {*regime.METHODS, "mean", "permuted", "msgd-scaled"}
    assert not plan.next_trials(records)
    tuned = [name for name in records if name.endswith("seed100")]
    assert len(tuned) == 6 * 6  # learning rates of 0.1 are best here, so no grid grows
    for method in plan.MAIN:
        seeds = {t.seed for t in plan.finals(method, records)}
        assert seeds == set(regime.SEEDS)
        swept = {dict(t.setting).get("weight_decay", 5e-4) for t in plan.decays(records) if t.method == method}
        assert swept == set(plan.DECAY_SWEEP)


@pytest.mark.parametrize(("best", "added"), [(0.03, 0.0095), (0.3, 0.95)])
def test_a_grid_grows_once_where_its_best_is_at_the_edge(best: float, added: float) -> None:
    records = {
        trial.name: {
            **record_of(trial, {}),
            "history": [{"epoch": 1, "robust": 0.1 + (dict(trial.setting)["lr"] == best)}],
        }
        for trial in plan.tuning("msgd")
    }
    grown = [trial for trial in plan.grid("msgd", records) if trial.name not in records]
    assert [dict(trial.setting)["lr"] for trial in grown] == [added]
    records[grown[0].name] = {**record_of(grown[0], {}), "history": [{"epoch": 1, "robust": 2.0}]}
    assert plan.chosen("msgd", "last", records) == grown[0]
    assert plan.grid("msgd", records)[-1] == grown[0]
    assert len(plan.grid("msgd", records)) == 7


def test_runs_are_told_apart_and_are_what_they_are_called() -> None:
    trial = plan.Trial("mean", plan.setting(lr=0.1, alpha=min(regime.ALPHAS)), 0)
    config = trial.config(Path("evidence.npz"))
    assert config.optimizer.endswith("controls.py:mean_low")
    assert config.eps == 8 / 255
    assert plan.Trial("msgd", plan.setting(lr=0.1), 0, radius=12).config(Path("x.npz")).eps == 12 / 255
    assert (
        not plan.tuning("engm")[0].config(Path("x.npz")).test
    )  # nobody looks at test images while settings are chosen
    folders = {t.cell(Path("x.npz")).folder_name for method in regime.METHODS for t in plan.tuning(method)}
    assert len(folders) == 36


def test_verdicts_follow_the_protocol() -> None:
    for values, worth, said in (
        ([1.5, 2.0, 1.8], 1.0, "yes"),
        ([0.3, 0.4, 0.5], 1.0, "yes, by less than 1"),
        ([0.3, -0.4, 0.1], 1.5, "no"),
        ([-0.3, -0.4, -0.35], 1.0, "no, it is worse"),
        ([3.0, -2.0, 1.0], 1.0, "cannot tell"),
        ([1.0, 1.0], 1.0, "cannot tell"),
        ([1.0], 1.0, "cannot tell"),
        ([], 1.0, "not run"),
    ):
        assert page.verdict(Mean.of(values), worth) == said, values


def test_less_overfitting_needs_a_last_checkpoint_that_is_no_worse() -> None:
    records = carried_out({"engm": 0.02})
    trials = [page._by(method, "last", records) for method in ("msgd", "engm")]
    overfit = page.Comparison("?", trials[0], trials[1], page.OVERFIT, 5.0, page.LAST)
    assert "**yes" in overfit.row(records)
    for trial in trials[1]:
        records[trial.name]["test"]["last"]["robust"] -= 0.2
    assert "the last checkpoint is worse" in overfit.row(records)


def test_the_page_of_a_plan_that_is_not_complete_says_so() -> None:
    whole = page.page(carried_out({"engm": 0.02}))
    assert "Everything that the protocol asks for has been run" in whole
    assert "not run" not in whole
    assert "| ENGM: last checkpoint more robust than MSGD's |" in whole
    for stages in (0, 1, 3, 5):
        text = page.page(carried_out({}, stages))
        assert "**Not complete:**" in text
        assert ("## Verdicts" in text) == (stages >= 2)
    assert "**yes" not in page.page(carried_out({}, 2))


def test_the_page_is_of_the_records_that_are_there() -> None:
    assert page.DOCS.joinpath("evidence.md").read_text(encoding="utf-8") == page.page(run.read_records())


def test_images_are_halved_by_the_mean_of_four(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    size = regime.TRAINED + regime.VALIDATION
    arrays = {"x_train": draw.integers(0, 256, (size + 3, 4, 4, 3), np.uint8), "y_train": np.arange(size + 3) % 10}
    np.savez(tmp_path / "cifar.npz", **arrays, x_test=arrays["x_train"], y_test=arrays["y_train"])
    data.write(tmp_path / "cifar.npz", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as found:
        assert found["x_train"].shape == (size, 2, 2, 3)
        corner = arrays["x_train"][5, 2:, :2, 1].astype(float).mean()
        assert abs(found["x_train"][5, 1, 0, 1] - corner) <= 0.5
        assert len(found["y_test"]) == min(regime.TEST, size + 3)
