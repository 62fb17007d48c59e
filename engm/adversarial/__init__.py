"""Adversarial training on top of the engine: attacks on inputs and weights, and the losses of training methods."""

from ..names import OBJECTIVES
from .attacks import PGD, Adversarial
from .autoattack import AutoAttackProgress, AutoAttackResult, autoattack
from .awp import AWP
from .backward_smoothing import BackwardSmoothing
from .beside import Beside, Guide, LabelAverages
from .deepfool import DeepFool, DeepFoolResult
from .losses import cross_entropy, kl_divergence, margin, probability_gap
from .modes import evaluation_mode, paused
from .objectives import VANILLA, Objective, lbgat, mart, objective, self_adaptive, trades, vanilla

__all__ = [
    "AWP",
    "OBJECTIVES",
    "PGD",
    "VANILLA",
    "Adversarial",
    "AutoAttackProgress",
    "AutoAttackResult",
    "BackwardSmoothing",
    "Beside",
    "DeepFool",
    "DeepFoolResult",
    "Guide",
    "LabelAverages",
    "Objective",
    "autoattack",
    "cross_entropy",
    "evaluation_mode",
    "kl_divergence",
    "lbgat",
    "margin",
    "mart",
    "objective",
    "paused",
    "probability_gap",
    "self_adaptive",
    "trades",
    "vanilla",
]
