"""Draws the README's pictures: the progress display and the learning curves of two short runs on digits.

python tools/draw_readme_pictures.py            # three minutes; writes docs/pictures/progress.svg and curves.png
"""

from __future__ import annotations

import io
import re
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from engm.recipes.config import RunConfig
from engm.recipes.processes import Processes
from engm.recipes.runs.curves import draw
from engm.recipes.runs.folder import train
from engm.recipes.runs.progress import RunView

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
SHOWN_AT = 18  # of 25 epochs, when the display is drawn
COMMON = {"epochs": 25, "batch_size": 64, "lr": 0.2, "alpha": "5", "loggers": (), "threads": 1}


class Recorded(RunView):
    """A progress display that saves a picture of itself in the epoch ``SHOWN_AT``."""

    def on_epoch(self) -> None:
        super().on_epoch()
        if self.run is not None and self.run.epoch == SHOWN_AT:
            recording = Console(record=True, width=100, force_terminal=True, file=io.StringIO())
            recording.print(self.picture())
            svg = recording.export_svg(title="engm train --optimizer engm")
            (PICTURES / "progress.svg").write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))


def main() -> None:
    """Trains with both optimizers and draws the pictures."""
    torch.set_num_threads(1)
    PICTURES.mkdir(exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for optimizer in ("msgd", "engm"):
            config = RunConfig(optimizer=optimizer, **COMMON)  # type: ignore[arg-type]
            with Recorded(Console(), f"{optimizer}: ") as view:
                results.append(train(config, Path(folder) / optimizer, Processes(torch.device("cpu")), view=view))
    draw(results, PICTURES / "curves.png")


if __name__ == "__main__":
    main()
