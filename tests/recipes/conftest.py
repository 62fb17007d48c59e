"""Pictures take most of the time of little runs, so that most tests have them drawn roughly."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

from engm.recipes import pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_roughly(patch: pytest.MonkeyPatch) -> None:
    """Everything is drawn into a picture, but its file is a small PNG, or says its kind; nothing is given more room."""
    save = pictures._save

    def save_roughly(figure: Figure, target: Path | IO[bytes], kind: str) -> None:
        if not isinstance(target, Path):
            save(figure, target, kind)
        elif kind == "png":
            figure.savefig(target, format=kind, dpi=20)
        else:
            target.write_text(kind)

    patch.setattr(pictures, "_save", save_roughly)
    patch.setattr(pictures, "_lay_out", lambda figure: figure.set_layout_engine("none"))


@pytest.fixture(autouse=True)
def rough_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules whose tests are about pictures replace this fixture by one that does nothing.

    What is made in a fixture of a module or a session is drawn before, and whole.
    """
    draw_roughly(monkeypatch)
