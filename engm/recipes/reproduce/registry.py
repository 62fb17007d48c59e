"""The analyses by name."""

from __future__ import annotations

from engm.checks import check_name

from .ablations import FIG_5
from .accuracy_tables import TABLE_2
from .analysis import Analysis
from .correlation_figure import FIG_3
from .gradient_figures import FIG_2, TABLE_5
from .landscape_figure import FIG_4
from .method_tables import FIG_1, TABLE_3, TABLE_3_L2
from .step_times import TABLE_1
from .wide_table import TABLE_4

_TABLES = (TABLE_1, TABLE_2, TABLE_3, TABLE_3_L2, TABLE_4, TABLE_5)
ANALYSES: dict[str, Analysis] = {one.name: one for one in (*_TABLES, FIG_1, FIG_2, FIG_3, FIG_4, *FIG_5)}


def analysis(name: str) -> Analysis:
    """An analysis by name.

    Raises:
        ValueError: there is none of this name; the message says which is nearest.
    """
    check_name(name, tuple(ANALYSES), what="figure or table")
    return ANALYSES[name]
