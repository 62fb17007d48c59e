"""The paper's figures, against each other and the text."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from engm.recipes.methods import LABELS
from engm.recipes.reproduce.outcome import save_picture
from engm.recipes.reproduce.published import MEAN_GAIN, TABLE1_SECONDS, TABLE2, TABLE3, TABLE4, TABLE5
from engm.recipes.reproduce.step_times import OWN, summarise_times


def test_overfit_follows_from_best_and_last_but_for_one_misprint() -> None:
    for name, row in TABLE2.items():
        follows = 100 * (row.best - row.last) / row.best
        assert (abs(follows - row.overfit) < 0.15) == (name != "engm")


def test_table_3_repeats_table_2_and_has_every_row() -> None:
    for optimizer in ("msgd", "engm"):
        mine, theirs = TABLE3["cifar10", "vanilla", optimizer], TABLE2[optimizer]
        assert (mine.natural, mine.best, mine.autoattack, mine.overfit) == (
            theirs.natural,
            theirs.best,
            theirs.autoattack,
            theirs.overfit,
        )
    assert len(TABLE3) == 3 * 4 * 2
    for data, reduction in (("cifar10", 9.3), ("cifar100", 13.5), ("tiny-imagenet", 16.27)):
        msgd, engm = (TABLE3[data, "vanilla", optimizer].overfit for optimizer in ("msgd", "engm"))
        assert round(msgd - engm, 2) == reduction


def test_the_texts_figures() -> None:
    assert round(TABLE1_SECONDS["engm"] / TABLE1_SECONDS["msgd"], 1) == 8.4
    assert round(TABLE4["awp", "engm"].autoattack - TABLE4["awp", "msgd"].autoattack, 2) == 1.28
    assert round(TABLE4["awp", "n-engm"].autoattack - TABLE4["awp", "msgd"].autoattack, 2) == 0.94
    gains = [TABLE3[d, m, "engm"].autoattack - TABLE3[d, m, "msgd"].autoattack for d, m, o in TABLE3 if o == "engm"]
    assert abs(fmean(gains) - MEAN_GAIN["linf"]) < 0.1
    assert sorted(TABLE5) == [0, 2, 4, 6, 8, 10]


def test_an_optimizer_that_the_paper_does_not_have_is_timed_without_its_ratio(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(LABELS, "soft", "Soft")
    seconds = {f"{name}, {OWN}": [0.1, 0.3, 0.2] for name in ("msgd", "sngm", "soft")}
    config = {"model": "vgg8", "attack_steps": 2, "batch_size": 8, "calibrate_every": 50, "tau": 50}
    outcome = summarise_times([{"labels": {}, "config": config, "seconds_per_step": seconds}])
    assert [row[0] for row in outcome.tables[0].rows] == ["MSGD", "SNGM", "Soft"]
    assert [row[-1] for row in outcome.tables[0].rows] == ["1.00", "1.05", ""]
    save_picture(outcome, path := tmp_path / "picture.png")
    assert path.stat().st_size > 0
