"""Rules of layers and operators: which terms a call contributes to the gradients of its parameters.

A rule is registered where it is written, so every file with rules is imported here.
"""

from . import activation, conv, embedding, fallback, linear, normalization, operators, recurrent
from .base import Activations, Cost, FunctionRule, Rule, WholeCallRule, find_rule, register_rule, registrations

__all__ = [
    "Activations",
    "Cost",
    "FunctionRule",
    "Rule",
    "WholeCallRule",
    "activation",
    "conv",
    "embedding",
    "fallback",
    "find_rule",
    "linear",
    "normalization",
    "operators",
    "recurrent",
    "register_rule",
    "registrations",
]
