"""Outer optimizers: weights for every example, around any torch optimizer."""

from .aengm import AENGM, NENGM
from .alpha import alpha_for
from .base import ExampleOptimizer, StepStats
from .baselines import FENGM, GNC, MSGD, SNGM
from .engm import ENGM

__all__ = ["AENGM", "ENGM", "FENGM", "GNC", "MSGD", "NENGM", "SNGM", "ExampleOptimizer", "StepStats", "alpha_for"]
