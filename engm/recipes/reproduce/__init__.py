"""The figures and tables of the paper as commands, at a cost that the user chooses."""

from .analysis import Analysis, Request
from .budgets import BUDGETS, Budget, budget
from .expense import Expense, expense_of
from .registry import ANALYSES, analysis
from .sweep import carry_out

__all__ = [
    "ANALYSES",
    "BUDGETS",
    "Analysis",
    "Budget",
    "Expense",
    "Request",
    "analysis",
    "budget",
    "carry_out",
    "expense_of",
]
