"""The analyses by name."""

from __future__ import annotations

from engm.checks import check_name

from .ablations import FIG_5
from .accuracy_tables import TABLE_2, TABLE_3, TABLE_4
from .analysis import Analysis
from .correlation_figure import FIG_3
from .gradient_figures import FIG_2, TABLE_5
from .landscape_figure import FIG_4
from .step_times import TABLE_1

ANALYSES: dict[str, Analysis] = {
    analysis.name: analysis for analysis in (TABLE_1, TABLE_2, TABLE_3, TABLE_4, TABLE_5, FIG_2, FIG_3, FIG_4, *FIG_5)
}


def analysis(name: str) -> Analysis:
    """An analysis by name.

    Raises:
        ValueError: there is none of this name; the message says which is nearest.
    """
    check_name(name, tuple(ANALYSES), what="figure or table")
    return ANALYSES[name]
