"""What the progress display says."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_runs import PLAIN, tiny_dataset

from engm.recipes.progress import RunView
from engm.recipes.ranks import Ranks
from engm.recipes.run_folder import train


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_from_begin_to_end(terminal: bool, tmp_path: Path) -> None:
    out = io.StringIO()
    with RunView(Console(file=out, force_terminal=terminal, width=120), "one: ") as view:
        train(
            replace(PLAIN, alpha="3"), tmp_path / "run", Ranks(torch.device("cpu")), view=view, dataset=tiny_dataset()
        )
    said = out.getvalue()
    assert "one: halves: 68 training, 14 validation, 30 test images." in said
    assert "ENGM, alpha 3" in said
    assert "clips nearly everything" not in said
    if terminal:
        assert "12/12" in said
        assert "steps/s" in said
    else:
        assert [line.split()[2] for line in said.splitlines() if "epoch" in line] == ["1/3", "2/3", "3/3"]


def test_a_threshold_that_leaves_nothing_is_pointed_out(tmp_path: Path) -> None:
    out = io.StringIO()
    with RunView(Console(file=out, width=120)) as view:
        config = replace(PLAIN, alpha="0.01")
        train(config, tmp_path / "run", Ranks(torch.device("cpu")), view=view, dataset=tiny_dataset())
    assert out.getvalue().count("alpha 0.01 clips nearly everything") == 1
