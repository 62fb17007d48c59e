"""Rules of the layer families: which terms a module call contributes to its parameters' gradients."""

from . import activation, conv, embedding, linear, normalization
from .base import Cost, FunctionRule, Rule, find_rule, register_rule

__all__ = [
    "Cost",
    "FunctionRule",
    "Rule",
    "activation",
    "conv",
    "embedding",
    "find_rule",
    "linear",
    "normalization",
    "register_rule",
]
