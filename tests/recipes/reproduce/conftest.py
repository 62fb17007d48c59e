"""Records of pretended runs, and analyses carried out at the smallest budget."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from engm.recipes.methods import METHOD_NAMES
from engm.recipes.reproduce import Request, analysis, budget, carry_out
from engm.recipes.reproduce.outcome import Outcome

Carry = Callable[..., Outcome]


def request(
    seeds: tuple[int, ...] = (0,),
    optimizers: tuple[str, ...] = METHOD_NAMES,
    rows: tuple[str, ...] = (),
    **settings: Any,
) -> Request:
    return Request(budget("smoke"), settings, seeds, optimizers, rows)


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by tests of one worker: analyses share their runs, too."""
    return tmp_path_factory.mktemp("reproduce")


@pytest.fixture(scope="session")
def carried() -> Carry:
    def carry(name: str, out: Path, *, asked: Request | None = None, jobs: int = 1, on_cell: Any = None) -> Outcome:
        asked = request() if asked is None else asked
        what = analysis(name)
        return carry_out(
            what,
            asked,
            what.wanted(asked),
            out,
            torch.device("cpu"),
            jobs=jobs,
            view=lambda title: nullcontext(None),  # type: ignore[arg-type]
            on_cell=on_cell or (lambda record, done: None),
        )

    return carry
