"""The rules of linear layers, ``dL_i/dW = B_i^T A_i`` over all positions, and of bilinear layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from .._C import by_position, linear_cost, row_terms
from ..cost.table import cost_arguments
from ..terms import BilinearFactors, LinearFactors, PerExampleGradient, Term
from ..torch_internals import output_shape
from .base import CPU, INPUT, OUTPUT, TURNED, Cost, Rule, add_rule


def matrix_cost(positions: int, p: int, d: int, device: torch.device, dtype: torch.dtype) -> Cost:
    """Cost, for one example, of the norm of a weight ``[d, p]`` that is used at so many positions."""
    return Cost.from_model(linear_cost(positions, p, d, **cost_arguments(device, dtype, convolution=False)))


class _MatrixRule(Rule):
    """What the rules of linear and bilinear layers share; dimensions between batch and features are positions."""

    reads_for = ("weight",)

    def describes(self, module: Any, node: Any, activations: Any, shape: tuple[int, ...]) -> bool:
        known = activations is None or tuple(activations.shape[:-1]) == shape[:-1]
        return known and output_shape(node)[-1:] == shape[-1:]

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


# Trained parameters by name, the activations [n, p] (None if no term needs them), the backprops [n, d].
RowCall = tuple[Mapping[str, nn.Parameter], Tensor | None, Tensor]

FEW_ELEMENTS = 1 << 16  # of backprops: about as many as take as long as a call from Python


def are_small_rows(shape: Sequence[int]) -> bool:
    """Whether an output of this shape is a row an example, and small enough to be set aside for others like it."""
    return len(shape) == 2 and 0 < shape[0] * shape[1] <= FEW_ELEMENTS


@add_rule(nn.Linear)
class LinearRule(_MatrixRule):
    """``[n, *, p] -> [n, *, d]``; the dimensions between are positions and are flattened to ``T``."""

    positionwise = True
    operators: ClassVar = dict.fromkeys(["Addmm", "SparseAddmm"], ("bias", INPUT, "weight" + TURNED)) | {
        "Mm": (INPUT, "weight" + TURNED),
        "Add": (OUTPUT, "bias"),
        **dict.fromkeys(["Linear", "MkldnnLinear"], (INPUT, "weight", "bias")),
    }

    @property
    def of_rows(self) -> bool:
        return type(self).terms is _MatrixRule.terms and type(self).factors is LinearRule.factors

    @staticmethod
    def terms_of_rows(calls: Sequence[RowCall], norms: bool) -> list[dict[str, tuple[Term, Tensor | None]]]:
        """The terms of many calls on a row an example, with the squared norms of their gradients.

        Between small layers Python takes longer than the arithmetic, which is all done by one call here.

        Args:
            calls: of linear layers.
            norms: whether norms of weights are wanted.
        """
        wanted = [
            (_dense(activations) if "weight" in parameters else None, backprops, "bias" in parameters)
            for parameters, activations, backprops in calls
        ]
        found: list[dict[str, tuple[Term, Tensor | None]]] = []
        for activations, backprops, norm_of_weight, sums, norm_of_bias in row_terms(wanted, norms):
            terms: dict[str, tuple[Term, Tensor | None]] = {}
            if activations is not None:
                terms["weight"] = LinearFactors(activations, backprops), norm_of_weight
            if sums is not None:
                terms["bias"] = PerExampleGradient(sums, norm_of_bias), norm_of_bias
            found.append(terms)
        return found

    def misses_batch(self, module: nn.Module, output: Tensor) -> bool:
        return output.dim() == 1

    def factors(self, activations: Tensor, backprops: Tensor) -> LinearFactors:
        return LinearFactors(*by_position(_dense(activations), backprops))

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


def _dense(activations: Any) -> Tensor:
    """Activations that may be sparse: a bag of words, say."""
    return activations if activations.layout == torch.strided else activations.to_dense()


@add_rule(nn.Bilinear)
class BilinearRule(_MatrixRule):
    """``[n, *, p], [n, *, q] -> [n, *, d]``; the dimensions between are positions and are flattened to ``T``."""

    operators: ClassVar = {"Trilinear": (INPUT, "weight", INPUT), "Add": (OUTPUT, "bias")}

    def describes(self, module: Any, node: Any, activations: Any, shape: tuple[int, ...]) -> bool:
        return super().describes(module, node, activations and activations[0], shape)

    def misses_batch(self, module: nn.Module, output: Tensor) -> bool:
        return output.dim() == 1

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
