"""Outer optimizers: weights for every example, around any torch optimizer."""

from .aengm import AENGM, NENGM
from .alpha import alpha_for
from .base import ExampleOptimizer, StepStats
from .baselines import MSGD
from .engm import ENGM

__all__ = ["AENGM", "ENGM", "MSGD", "NENGM", "ExampleOptimizer", "StepStats", "alpha_for"]
