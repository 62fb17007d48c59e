"""Adversarial training on top of the engine: attacks on inputs and weights, and the losses of training methods."""

from .attacks import PGD, Adversarial
from .autoattack import AutoAttackProgress, AutoAttackResult, autoattack
from .awp import AWP
from .deepfool import DeepFool, DeepFoolResult
from .losses import cross_entropy, kl_divergence, margin
from .modes import evaluation_mode, paused
from .objectives import OBJECTIVES, VANILLA, Objective, mart, objective, trades, vanilla

__all__ = [
    "AWP",
    "OBJECTIVES",
    "PGD",
    "VANILLA",
    "Adversarial",
    "AutoAttackProgress",
    "AutoAttackResult",
    "DeepFool",
    "DeepFoolResult",
    "Objective",
    "autoattack",
    "cross_entropy",
    "evaluation_mode",
    "kl_divergence",
    "margin",
    "mart",
    "objective",
    "paused",
    "trades",
    "vanilla",
]
