"""The rules of convolutions in one, two and three dimensions: from a layer's options to the factors of its gradient.

A convolution is a linear layer over patches, which are never unfolded. In a transposed convolution input and output
change places: its weight gradient is that of a convolution which reads the gradient of the output and whose backprops
are the input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .._C import conv_cost
from ..cost.table import cost_arguments
from ..terms import ConvFactors, ConvGeometry, PerExampleGradient, Term
from .base import CPU, Cost, Rule, add_rule


def padded_input(module: Any, activations: Tensor) -> tuple[Tensor, ConvGeometry]:
    """The input and geometry of the zero-padded convolution that ``module`` amounts to.

    Symmetric zero padding stays in the geometry. Other padding modes, and the uneven padding of ``"same"`` with an even
    kernel, are applied to a copy of the input.

    Args:
        module: the convolution.
        activations: its input, ``[n, C, *S]``.

    Returns:
        The input, padded or as it is, and the geometry by which it is read.
    """
    before, after = [], []
    for size, dilation, pad in _sides(module):
        total = dilation * (size - 1) if pad == "same" else 2 * int(pad)
        before.append(total // 2)
        after.append(total - total // 2)
    geometry = ConvGeometry(module.kernel_size, module.stride, tuple(before), module.dilation, module.groups)
    if module.padding_mode == "zeros" and before == after:
        return activations, geometry
    sides = [width for k in reversed(range(len(before))) for width in (before[k], after[k])]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(activations, sides, mode=mode), geometry.without_padding()


def _sides(module: Any) -> list[tuple[int, int, Any]]:
    """``(kernel size, dilation, padding)`` of every spatial dimension; ``padding`` may be ``"same"``."""
    padding = module.padding
    if isinstance(padding, str):
        padding = tuple("same" if padding == "same" else 0 for _ in module.kernel_size)
    return list(zip(module.kernel_size, module.dilation, padding, strict=True))


class _ConvolutionRule(Rule):
    """What the rules of convolutions and of transposed convolutions share."""

    options = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")

    reads_for = ("weight",)

    def factors(self, module: Any, inputs: Tensor, backprops: Tensor) -> ConvFactors:
        """The weight's term, from the module's input and the gradient of its output, which are of one dtype."""
        raise TypeError(f"{type(self).__name__} must define factors")

    def misses_batch(self, module: Any, output: Tensor) -> bool:
        return output.dim() == len(module.kernel_size) + 1

    def terms(
        self,
        module: nn.Module,
        activations: Tensor,
        backprops: Tensor,
        saved: Any,
        names: tuple[str, ...],
    ) -> dict[str, Term]:
        terms: dict[str, Term] = {}
        if "weight" in names:
            terms["weight"] = self.factors(module, ops.in_type(activations, backprops.dtype), backprops)
        if "bias" in names:
            norm_sq, sums = ops.position_sums(backprops.flatten(2), 2)
            terms["bias"] = PerExampleGradient(sums, norm_sq)
        return terms

    def cost(
        self,
        module: nn.Module,
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> Cost:
        inputs, backprops = (torch.empty(shape, device="meta") for shape in (input_shape, output_shape))
        factors = self.factors(module, inputs, backprops)
        geometry = factors.geometry
        return Cost.from_model(
            conv_cost(
                factors.inputs.shape[1],
                factors.backprops.shape[1],
                geometry.kernel_size,
                geometry.stride,
                geometry.padding,
                geometry.dilation,
                geometry.groups,
                tuple(factors.inputs.shape[2:]),
                tuple(factors.backprops.shape[2:]),
                **cost_arguments(device, dtype, convolution=True),
                channels_last=channels_last,
            )
        )


@add_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvRule(_ConvolutionRule):
    """``[n, C, *S] -> [n, d, *S_out]`` with any stride, dilation, groups, padding and padding mode."""

    def factors(self, module: Any, inputs: Tensor, backprops: Tensor) -> ConvFactors:
        x, geometry = padded_input(module, inputs)
        return ConvFactors(x, backprops, geometry)


def transposed_factors(inputs: Tensor, backprops: Tensor, geometry: ConvGeometry) -> ConvFactors:
    """Factors of a transposed convolution's weight ``[C, d / groups, *kernel]``.

    Args:
        inputs: input of the transposed convolution, ``[n, C, *S]``.
        backprops: gradient of the transposed convolution's output, ``[n, d, *S_out]``.
        geometry: kernel, stride, padding, dilation and groups of the transposed convolution.
    """
    missing = []
    for k in reversed(range(len(geometry.kernel_size))):
        read = backprops.shape[2 + k] + 2 * geometry.padding[k] - geometry.extent(k)
        missing += [0, read // geometry.stride[k] + 1 - inputs.shape[2 + k]]
    if any(missing):  # with output padding of a stride or more there are outputs in which no input has a part
        inputs = F.pad(inputs, missing)
    return ConvFactors(backprops, inputs, geometry, transposed=True)


@add_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class ConvTransposeRule(_ConvolutionRule):
    """``[n, C, *S] -> [n, d, *S_out]`` with any stride, dilation, groups, padding, output padding and output size."""

    def factors(self, module: Any, inputs: Tensor, backprops: Tensor) -> ConvFactors:
        geometry = ConvGeometry(module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
        return transposed_factors(inputs, backprops, geometry)
