"""The rules of linear layers, ``dL_i/dW = B_i^T A_i`` over all positions, and of bilinear layers."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .._C import by_position, linear_cost
from ..cost.table import cost_arguments
from ..terms import BilinearFactors, LinearFactors, PerExampleGradient, Term
from .base import CPU, Cost, Rule, add_rule


def matrix_cost(positions: int, p: int, d: int, device: torch.device, dtype: torch.dtype) -> Cost:
    """Cost, for one example, of the norm of a weight ``[d, p]`` that is used at so many positions."""
    return Cost.from_model(linear_cost(positions, p, d, **cost_arguments(device, dtype, convolution=False)))


class _MatrixRule(Rule):
    """What the rules of linear and bilinear layers share; dimensions between batch and features are positions."""

    reads_for = ("weight",)

    def factors(self, activations: Any, backprops: Tensor) -> LinearFactors | BilinearFactors:
        """The weight's term, from what :meth:`terms` was given."""
        raise TypeError(f"{type(self).__name__} must define factors")

    def terms(
        self,
        module: nn.Module,
        activations: Any,
        backprops: Tensor,
        saved: Any,
        names: tuple[str, ...],
    ) -> dict[str, Term]:
        terms: dict[str, Term] = {}
        if "weight" in names:
            terms["weight"] = factors = self.factors(activations, backprops)
            b = factors.backprops
        else:
            b = by_position(backprops, backprops)[1]
        if "bias" in names:
            norm_sq, sums = ops.position_sums(b, 1)
            terms["bias"] = PerExampleGradient(sums, norm_sq)
        return terms


@add_rule(nn.Linear)
class LinearRule(_MatrixRule):
    """``[n, *, p] -> [n, *, d]``; the dimensions between are positions and are flattened to ``T``."""

    positionwise = True

    def misses_batch(self, module: nn.Module, output: Tensor) -> bool:
        return output.dim() == 1

    def factors(self, activations: Tensor, backprops: Tensor) -> LinearFactors:
        if activations.layout != torch.strided:  # a bag of words, say
            activations = activations.to_dense()
        return LinearFactors(*by_position(activations, backprops))

    def cost(
        self,
        module: nn.Module,
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> Cost:
        return matrix_cost(prod(output_shape[1:-1]), input_shape[-1], output_shape[-1], device, dtype)


@add_rule(nn.Bilinear)
class BilinearRule(_MatrixRule):
    """``[n, *, p], [n, *, q] -> [n, *, d]``; the dimensions between are positions and are flattened to ``T``."""

    def activations(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return tuple(args[k] if k < len(args) else kwargs.get(f"input{k + 1}") for k in range(2))

    def factors(self, activations: Any, backprops: Tensor) -> BilinearFactors:
        (first, _), (second, b) = (by_position(x, backprops) for x in activations)
        return BilinearFactors(first, second, b)

    def cost(
        self,
        module: Any,
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> Cost:
        pairs = module.in1_features * module.in2_features
        return matrix_cost(prod(output_shape[1:-1]), pairs, output_shape[-1], device, dtype)
