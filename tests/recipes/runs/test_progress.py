"""What the progress display says."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_runs import PLAIN, tiny_dataset

from engm.recipes.processes import Processes
from engm.recipes.runs.folder import train
from engm.recipes.runs.progress import RunView


class Shown(RunView):
    """Keeps what it shows after the sixth step."""

    shown = ""

    def on_step(self) -> None:
        super().on_step()
        if self.run is not None and self.run.trainer.steps == 6:
            console = Console(file=io.StringIO(), width=120)
            console.print(self.picture())
            self.shown = console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_from_begin_to_end(terminal: bool, tmp_path: Path) -> None:
    out = io.StringIO()
    with Shown(Console(file=out, force_terminal=terminal, width=120), "one: ") as view:
        config = replace(PLAIN, alpha="3")
        train(config, tmp_path / "run", Processes(torch.device("cpu")), view=view, dataset=tiny_dataset())
    said = out.getvalue()
    assert "one: halves: 68 training, 14 validation, 30 test images." in said
    assert "ENGM, alpha 3" in said
    assert "clips nearly everything" not in said
    assert "one: epoch 2/3" in view.shown
    assert "6/12" in view.shown
    assert "steps/s" in view.shown
    if not terminal:
        assert [line.split()[2] for line in said.splitlines() if "epoch" in line] == ["1/3", "2/3", "3/3"]


def test_a_threshold_that_leaves_nothing_is_pointed_out(tmp_path: Path) -> None:
    out = io.StringIO()
    with RunView(Console(file=out, width=120)) as view:
        config = replace(PLAIN, alpha="0.01")
        train(config, tmp_path / "run", Processes(torch.device("cpu")), view=view, dataset=tiny_dataset())
    assert out.getvalue().count("alpha 0.01 clips nearly everything") == 1
