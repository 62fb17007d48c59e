"""Counts what networks take, into engm/recipes/reproduce/network_counts.py, from which plans of analyses read it."""

from __future__ import annotations

from pathlib import Path

import torch

from engm.recipes.models import MODELS
from engm.recipes.reproduce.budgets import BUDGETS
from engm.recipes.reproduce.counting import counted
from engm.recipes.reproduce.forecast import NAMED

FILE = Path(__file__).parents[1] / "engm/recipes/reproduce/network_counts.py"
_HEAD = '''"""What do networks take? Their operations, for plans, which are made without torch.

Written by tools/count_networks.py; a test holds every number equal to what is counted from the network itself.
"""

from __future__ import annotations

COUNTS: dict[tuple[str, int | None, tuple[int, int, int], int], tuple[int, int]] = {
'''
_TAIL = '''}
"""Operations of a forward pass of one image, and modules without children, by network, width, image and classes."""
'''


def networks() -> list[tuple[str, int | None]]:
    """Our networks at their published width, and those of the budgets."""
    of_budgets = [(b.settings["model"], b.settings["width"]) for b in BUDGETS.values() if "model" in b.settings]
    wide = [(b.wide_model, None) for b in BUDGETS.values()]
    return list(dict.fromkeys([*((name, None) for name in MODELS), *of_budgets, *wide]))


def text() -> str:
    """The content of the file."""
    lines = []
    images = sorted({(shape, classes) for _, _, classes, shape in NAMED.values()})
    with torch.device("meta"):  # sizes are all that is asked for
        for model, width in networks():
            for shape, classes in images:
                found = counted(model, width, shape, classes, "batch")
                lines.append(f'    ("{model}", {width}, {shape}, {classes}): {found},\n')
    return "".join([_HEAD, *lines, _TAIL])


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
