"""Linear layers, ``dL_i/dW = B_i^T A_i`` over any number of positions, and layers linear in each of two inputs."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .._C import linear_cost
from ..cost.table import cost_arguments
from ..terms import BilinearFactors, LinearFactors, PerExampleGradient, Term, accumulation_dtype
from .base import CPU, Cost, Rule, add_rule


@add_rule(nn.Linear)
class LinearRule(Rule):
    """``[n, *, p] -> [n, *, d]``; the dimensions between are positions and are flattened to ``T``."""

    positionwise = True

    def reads_activations(self, names: tuple[str, ...]) -> bool:
        return "weight" in names

    def terms(
        self,
        module: nn.Module,
        activations: Tensor,
        backprops: Tensor,
        saved: Any,
        rows: slice,
        names: tuple[str, ...],
    ) -> dict[str, Term]:
        n = backprops.shape[0]
        b = backprops.reshape(n, -1, backprops.shape[-1])
        terms: dict[str, Term] = {}
        if "weight" in names:
            a = activations.to(b.dtype).reshape(n, -1, activations.shape[-1])
            terms["weight"] = LinearFactors(a, b)
        if "bias" in names:
            terms["bias"] = PerExampleGradient(b.sum(1, dtype=accumulation_dtype(b)))
        return terms

    def cost(
        self,
        module: nn.Module,
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> Cost:
        where = cost_arguments(device, dtype, convolution=False)
        return Cost.from_model(linear_cost(prod(output_shape[1:-1]), input_shape[-1], output_shape[-1], **where))


@add_rule(nn.Bilinear)
class BilinearRule(Rule):
    """``[n, *, p], [n, *, q] -> [n, *, d]``; the dimensions between are positions and are flattened to ``T``."""

    def activations(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return tuple(args[k] if k < len(args) else kwargs.get(f"input{k + 1}") for k in range(2))

    def reads_activations(self, names: tuple[str, ...]) -> bool:
        return "weight" in names

    def terms(
        self,
        module: nn.Module,
        activations: Any,
        backprops: Tensor,
        saved: Any,
        rows: slice,
        names: tuple[str, ...],
    ) -> dict[str, Term]:
        n = backprops.shape[0]
        b = backprops.reshape(n, -1, backprops.shape[-1])
        terms: dict[str, Term] = {}
        if "weight" in names:
            first, second = (x[rows].to(b.dtype).reshape(n, -1, x.shape[-1]) for x in activations)
            terms["weight"] = BilinearFactors(first, second, b)
        if "bias" in names:
            terms["bias"] = PerExampleGradient(b.sum(1, dtype=accumulation_dtype(b)))
        return terms

    def cost(
        self,
        module: Any,
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> Cost:
        pairs, where = module.in1_features * module.in2_features, cost_arguments(device, dtype, convolution=False)
        return Cost.from_model(linear_cost(prod(output_shape[1:-1]), pairs, output_shape[-1], **where))
