"""Outer optimizers: weights for every example, around any torch optimizer."""

from .aengm import AENGM, NENGM
from .alpha import alpha_for
from .base import ExampleOptimizer
from .baselines import FENGM, GNC, MSGD, SNGM
from .engm import ENGM
from .weights import ExampleNorms, StepStats, Weighting

__all__ = [
    "AENGM",
    "ENGM",
    "FENGM",
    "GNC",
    "MSGD",
    "NENGM",
    "SNGM",
    "ExampleNorms",
    "ExampleOptimizer",
    "StepStats",
    "Weighting",
    "alpha_for",
]
