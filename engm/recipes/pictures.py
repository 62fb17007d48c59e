"""Pictures of results: PNG files that are whole or not there, and the marks that several of them share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .storage.atomic_files import replaced_when_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@contextmanager
def picture(path: Path, size: tuple[float, float], *, dpi: int = 120) -> Iterator[Figure]:
    """An empty figure to draw into, which is written when the context ends without an exception.

    Args:
        path: file to write, a PNG whatever its ending; one that exists is replaced.
        size: width and height in inches.
        dpi: pixels an inch.

    Raises:
        OSError: the file could not be written; what was there before is there still.
    """
    from matplotlib.figure import Figure  # imported here, because the command line starts faster without it

    figure = Figure(figsize=size, layout="constrained")
    yield figure
    with replaced_when_whole(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


def mark_decays(axes: Axes, epochs: Iterable[int]) -> None:
    """Dotted vertical lines after the epochs at whose ends the learning rate is divided."""
    for epoch in epochs:
        axes.axvline(epoch + 0.5, color="grey", linestyle=":", linewidth=1)
