"""The rules of convolutions in one, two and three dimensions: from a layer's options to the factors of its gradient.

A convolution is a linear layer over patches, which are never unfolded. In a transposed convolution input and output
change places: its weight gradient is that of a convolution which reads the gradient of the output and whose backprops
are the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .._C import conv_cost
from ..cost.table import cost_arguments
from ..terms import ConvFactors, ConvGeometry, PerExampleGradient, Term
from ..torch_internals import entering_shape, output_shape, saved_by, saved_option
from .base import CPU, INPUT, Cost, Rule, add_rule
from .entries import names_of


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
    geometry = _geometry(module, tuple(before))
    if module.padding_mode == "zeros" and before == after:
        return activations, geometry
    sides = [width for k in reversed(range(len(before))) for width in (before[k], after[k])]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(activations, sides, mode=mode), geometry.without_padding()


def _sides(module: Any) -> list[tuple[int, int, Any]]:
    """``(kernel size, dilation, padding)`` of every spatial dimension; ``padding`` may be ``"same"``."""
    size = tuple(module.weight.shape[2:])
    padding = module.padding
    if isinstance(padding, str):
        padding = tuple("same" if padding == "same" else 0 for _ in size)
    return list(zip(size, each(module.dilation, len(size)), each(padding, len(size)), strict=True))


def each(option: Any, dims: int) -> tuple[Any, ...]:
    """An option of a convolution for every spatial dimension, of which torch takes one for all too."""
    found = tuple(option) if isinstance(option, Sequence) else (option,)
    return found * dims if len(found) == 1 else found


def _geometry(module: Any, padding: Any) -> ConvGeometry:
    """How a convolution with so much zero padding reads its input."""
    size = tuple(module.weight.shape[2:])
    stride, padding, dilation = (each(option, len(size)) for option in (module.stride, padding, module.dilation))
    return ConvGeometry(size, stride, padding, dilation, module.groups)


class _ConvolutionRule(Rule):
    """What the rules of convolutions and of transposed convolutions share."""

    options = ("stride", "padding", "dilation", "groups", "padding_mode")

    reads_for = ("weight",)
    operators: ClassVar = dict.fromkeys(
        ["Convolution", "ConvolutionOverrideable", "CudnnConvolution", "MiopenConvolution", "MkldnnConvolution"],
        (INPUT, "weight", "bias"),
    )
    on_inputs = names_of(
        """
        Cat ConstantPadNd CopySlices ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D
        ReplicationPad3D Slice
        """
    )

    def factors(self, module: Any, inputs: Tensor, backprops: Tensor) -> ConvFactors:
        """The weight's term, from the module's input and the gradient of its output, which are of one dtype."""
        raise TypeError(f"{type(self).__name__} must define factors")

    def misses_batch(self, module: Any, output: Tensor) -> bool:
        return output.dim() == module.weight.dim() - 1

    def read(self, module: Any, inputs: Tensor) -> tuple[Tensor, ConvGeometry]:
        """The zero-padded input that the layer amounts to a convolution of, and how it is read."""
        raise TypeError(f"{type(self).__name__} must define read")

    def describes(self, module: Any, node: Any, activations: Any, shape: tuple[int, ...]) -> bool:
        if activations is None:
            return True
        inputs = torch.empty(activations.shape, device="meta")
        alone = self.misses_batch(module, inputs)
        inputs, geometry = self.read(module, inputs.unsqueeze(0) if alone else inputs)
        made = output_shape(node)
        if (made[1:] if alone and made[:1] == (1,) else made) != shape:
            return False
        same = {"stride": geometry.stride, "dilation": geometry.dilation}
        if module.padding != "same":  # where torch pads what is uneven alone
            same["padding"] = geometry.padding
            child, number = node.next_functions[0]
            given = saved_by(node, "input") if child is None else None
            size = entering_shape(child, number) if child is not None else None if given is None else given.shape
            if size is not None and tuple(size) != tuple(inputs.shape):
                return False
        dims, groups = len(geometry.kernel_size), saved_option(node, "groups")
        saved = {name: saved_option(node, name) for name in same}
        return groups in (None, geometry.groups) and all(
            saved[name] is None or each(saved[name], dims) == wanted for name, wanted in same.items()
        )

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

    def read(self, module: Any, inputs: Tensor) -> tuple[Tensor, ConvGeometry]:
        return padded_input(module, inputs)

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

    def read(self, module: Any, inputs: Tensor) -> tuple[Tensor, ConvGeometry]:
        return inputs, _geometry(module, module.padding)

    def factors(self, module: Any, inputs: Tensor, backprops: Tensor) -> ConvFactors:
        return transposed_factors(inputs, backprops, _geometry(module, module.padding))
