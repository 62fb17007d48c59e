"""The figures and tables of the paper as commands, at a cost that the user chooses."""

from .analysis import Analysis, Request
from .budgets import BUDGETS, Budget, budget
from .cells import Cell
from .expense import Expense
from .forecast import forecast
from .registry import ANALYSES, analysis
from .sweep import carry_out, compute, shared_cells

__all__ = [
    "ANALYSES",
    "BUDGETS",
    "Analysis",
    "Budget",
    "Cell",
    "Expense",
    "Request",
    "analysis",
    "budget",
    "carry_out",
    "compute",
    "forecast",
    "shared_cells",
]
