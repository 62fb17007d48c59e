"""Rules of the layer families: which terms a module call contributes to its parameters' gradients."""

from . import activation, conv, embedding, fallback, linear, normalization, operators, recurrent
from .base import Activations, Cost, FunctionRule, Rule, WholeCallRule, find_rule, register_rule

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
]
