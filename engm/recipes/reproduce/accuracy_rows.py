"""What a row of a table of accuracies is made from, and which figures it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .published import Accuracies
from .statistics import Record, figure

Figure_ = Callable[[Record], float | None]
NATURAL: Figure_ = figure("test", "best", "natural")
BEST: Figure_ = figure("test", "best", "robust")
LAST: Figure_ = figure("test", "last", "robust")
OVERFIT: Figure_ = figure("overfit")
AUTOATTACK: Figure_ = figure("measures", "autoattack")
COLUMNS: dict[str, tuple[Figure_, str]] = {
    "Natural": (NATURAL, "natural"),
    "Best": (BEST, "best"),
    "Last": (LAST, "last"),
    "AA": (AUTOATTACK, "autoattack"),
    "Overfit": (OVERFIT, "overfit"),
}


@dataclass(frozen=True)
class Row:
    """A row of a table of accuracies.

    Attributes:
        label: name of the row.
        labels: labels of the cells that it is made from.
        published: the paper's row, if there is one.
        panel: name of the panel of a picture that shows the row, where there are several.
        variant: number of the row among those of one optimizer in its panel, which are drawn with other dashes.
    """

    label: str
    labels: Mapping[str, Any]
    published: Accuracies | None
    panel: str = ""
    variant: int = 0
