"""Adversarial training on top of the engine: attacks (the inner problem) and the losses they are run against."""

from .attacks import PGD, Adversarial, cross_entropy, evaluation_mode, margin, paused
from .objectives import OBJECTIVES, VANILLA, Objective, vanilla

__all__ = [
    "OBJECTIVES",
    "PGD",
    "VANILLA",
    "Adversarial",
    "Objective",
    "cross_entropy",
    "evaluation_mode",
    "margin",
    "paused",
    "vanilla",
]
