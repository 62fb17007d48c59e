"""The runs of a comparison: which threshold each optimizer takes."""

from __future__ import annotations

import pytest

from engm.recipes.config import RunConfig
from engm.recipes.methods import LABELS
from engm.recipes.runs.compare import cells_of


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        ("paper", {"engm": "paper", "a-engm": "paper", "n-engm": "paper"}),
        ("scaled", {"engm": "scaled", "a-engm": "scaled", "n-engm": "scaled"}),
        ("5", {"engm": "5.0", "a-engm": "5.0", "n-engm": "0.5"}),
    ],
)
def test_thresholds_of_a_comparison(alpha: str, expected: dict[str, str]) -> None:
    cells = cells_of(RunConfig(data="digits", alpha=alpha), list(LABELS), [0])
    assert {cell.optimizer: cell.alpha for cell in cells.values()} == {
        name: expected.get(name, "paper") for name in LABELS
    }
