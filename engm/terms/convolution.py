"""The term of a convolution: per-example gradients of its weight, from input and output gradient.

Several uses of one weight, or several images of one example, are laid in one image, so that they have one term.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .base import LocalCorrection, PerExampleGradient, Term
from .factors import Factors, cheaper_to_keep, cheaper_to_scale, refuse_correction
from .owners import Owners

MOST_PADDED = 2.0  # how many times as many pixels as there are several uses of a weight may have in one image
MOST_IN_A_STACK = 1 << 21  # products in a weight gradient for which oneDNN on the CPU is not worth its beginning


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution with zero padding reads its input; every tuple has one entry a spatial dimension."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def extent(self, dim: int) -> int:
        """Pixels that one output position spans along ``dim``."""
        return self.dilation[dim] * (self.kernel_size[dim] - 1) + 1

    def without_padding(self) -> ConvGeometry:
        """The same convolution of an input that is padded already."""
        return ConvGeometry(self.kernel_size, self.stride, (0,) * len(self.padding), self.dilation, self.groups)

    def of_stack(self) -> ConvGeometry:
        """The same convolution of every image in a stack ``[n, C, images, *S]``."""
        return ConvGeometry(
            (1, *self.kernel_size), (1, *self.stride), (0, *self.padding), (1, *self.dilation), self.groups
        )


@dataclass
class ConvFactors(Factors):
    """``g_i = B_i^T patches(X_i)``, the gradients of a weight ``[d, C / groups, *kernel]``.

    Attributes:
        inputs: input of the convolution, ``[n, C, *S]``.
        backprops: gradient of the convolution's output, ``[n, d, *S_out]``.
        geometry: how the convolution reads its input.
        correction: what a batch norm behind the convolution subtracts.
        transposed: whether the weight is that of a transposed convolution; then ``inputs`` is the gradient of the
            output and ``backprops`` the input.
        stacked: whether the first spatial dimension counts images of one example and is none of the weight's.
    """

    by_example: ClassVar[tuple[str, ...]] = ("inputs", "backprops")

    inputs: Tensor
    backprops: Tensor
    geometry: ConvGeometry
    correction: LocalCorrection | None = None
    transposed: bool = False
    stacked: bool = False

    @property
    def gradient_shape(self) -> tuple[int, ...]:
        kernel = self.geometry.kernel_size[1 if self.stacked else 0 :]
        return self.backprops.shape[1], self.inputs.shape[1] // self.geometry.groups, *kernel

    @property
    def alike(self) -> Hashable:
        return self.geometry, self.transposed, self.stacked, self.inputs.shape[1:], self.backprops.shape[1:]

    def concatenated(self, others: Sequence[Self]) -> Self:
        uses = (self, *others)
        inputs, backprops = torch.cat([use.inputs for use in uses]), torch.cat([use.backprops for use in uses])
        return replace(self, inputs=inputs, backprops=backprops)

    def _read(self) -> tuple[Any, ...]:
        """The geometry as the operators take it."""
        geometry = self.geometry
        return geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation, geometry.groups

    def squared_norm(self) -> Tensor:
        correction = self.correction.as_arguments() if self.correction else {}
        return ops.conv_norm_sq(self.inputs, self.backprops, *self._read(), **correction)

    def compact(self) -> Term:
        elements = prod(self.gradient_shape) * self.inputs.shape[0]
        smaller = elements < self.inputs.numel() + self.backprops.numel()
        if not (smaller or cheaper_to_keep(elements, prod(self.backprops.shape[2:]), self.inputs)):
            return self
        norm_sq, gradients = ops.conv_grads(self.inputs, self.backprops, *self._read())
        return PerExampleGradient(self._unstacked(gradients), norm_sq)

    def to_scale(self) -> Tensor:
        if self.transposed:
            return cheaper_to_scale(self.inputs, self.backprops)
        return cheaper_to_scale(self.backprops, self.inputs)

    def sum_of_scaled(self, scaled: Tensor) -> Tensor:
        inputs, backprops = self.inputs, self.backprops
        inputs, backprops = (inputs, scaled) if self.to_scale() is backprops else (scaled, backprops)
        return self._unstacked(conv_weight_gradient(inputs, backprops, self.geometry))

    def dense(self, rows: slice) -> Tensor:
        gradients = ops.conv_grads(self.inputs[rows], self.backprops[rows], *self._read())[1]
        gradients = self._unstacked(gradients)
        return gradients if self.correction is None else self.correction.corrected(gradients, rows)

    def _unstacked(self, gradient: Tensor) -> Tensor:
        """A gradient ``[..., *kernel]`` in the weight's own dimensions."""
        return gradient.squeeze(-len(self.geometry.kernel_size)) if self.stacked else gradient

    def _folded(self, outer: int, n: int, inner: int) -> Term:
        refuse_correction(self.correction)
        x, gy = (t.unflatten(0, (outer, n, inner)) for t in (self.inputs, self.backprops))
        if len(self.geometry.kernel_size) < 3 and not self.stacked:
            x, gy = (t.transpose(0, 1).flatten(1, 2).transpose(1, 2) for t in (x, gy))
            return replace(self, inputs=x, backprops=gy, geometry=self.geometry.of_stack(), stacked=True)
        rows = [(o, i) for o in range(outer) for i in range(inner)]
        return side_by_side([replace(self, inputs=x[o, :, i], backprops=gy[o, :, i]) for o, i in rows])

    def _regrouped(self, owners: Owners) -> Term:
        refuse_correction(self.correction)
        return super()._regrouped(owners)


def conv_weight_gradient(inputs: Tensor, backprops: Tensor, geometry: ConvGeometry) -> Tensor:
    """The weight gradient summed over the batch.

    ATen's operators compute it (oneDNN, cuDNN). On the CPU oneDNN takes 60 µs to begin with, so there a small gradient
    is that of one example which has all images of the batch in a stack.

    Args:
        inputs: ``[n, C, *S]``.
        backprops: ``[n, d, *S_out]``.
        geometry: how the convolution reads its input.

    Returns:
        ``[d, C / groups, *kernel]`` in the dtype of the operands.
    """
    shape = (backprops.shape[1], inputs.shape[1] // geometry.groups, *geometry.kernel_size)
    small = backprops.numel() * prod(shape[1:]) <= MOST_IN_A_STACK and len(shape) < 5
    if small and inputs.is_cpu and inputs.dtype in (torch.float32, torch.float64):
        x, gy = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (inputs, backprops))
        one = geometry.of_stack()
        _, of_all = ops.conv_grads(x, gy, one.kernel_size, one.stride, one.padding, one.dilation, one.groups)
        return of_all.view(shape)
    weight = inputs.new_empty(1).expand(shape)  # only its shape is read
    _, gradient, _ = torch.ops.aten.convolution_backward(
        backprops,
        inputs,
        weight,
        None,
        list(geometry.stride),
        list(geometry.padding),
        list(geometry.dilation),
        False,
        [0] * len(geometry.kernel_size),
        geometry.groups,
        [False, True, False],
    )
    return gradient


def joined_convolutions(terms: Sequence[ConvFactors]) -> list[ConvFactors]:
    """The uses of one weight in as few terms as their geometries allow, and as are not mostly padding."""
    alike: dict[Any, list[ConvFactors]] = {}
    for term in terms:
        alike.setdefault((term.geometry.without_padding(), term.transposed, term.stacked), []).append(term)
    return [side_by_side(some) if len(some) > 1 else some[0] for group in alike.values() for some in _fitting(group)]


def _fitting(terms: list[ConvFactors]) -> list[list[ConvFactors]]:
    """The terms in groups of which side by side at most ``1 - 1 / MOST_PADDED`` is padding, the largest image first."""
    found: list[tuple[list[ConvFactors], tuple[int, int, list[int]]]] = []  # with rows, pixels, and the largest widths
    for term in sorted(terms, key=lambda term: -prod(term.backprops.shape[2:])):
        own, *others = term.backprops.shape[2:]
        for number, (group, (rows, pixels, widths)) in enumerate(found):
            whole = rows + own, pixels + own * prod(others), list(map(max, widths, others))
            if whole[0] * prod(whole[2]) <= MOST_PADDED * whole[1]:
                found[number] = group, whole
                group.append(term)
                break
        else:
            found.append(([term], (own, own * prod(others), others)))
    return [group for group, _ in found]


def side_by_side(terms: Sequence[ConvFactors]) -> ConvFactors:
    """One term for several uses of a weight, which are laid along the first spatial dimension of one image.

    Each input is padded, trimmed to the pixels that are read, and rounded up to a multiple of the stride, so that
    every use keeps its own output rows; the output rows that straddle two uses get a zero gradient. Norms and
    weighted sums of the result then hold the cross terms between uses.

    Args:
        terms: the uses, which may differ in padding and size alone.
    """
    geometry = terms[0].geometry.without_padding()
    dims = len(geometry.kernel_size)
    spatial = [max(term.backprops.shape[2 + k] for term in terms) for k in range(dims)]
    inputs, backprops = [], []
    for term in terms:
        x, gy, own = term.inputs, term.backprops, term.geometry
        x_pad, gy_pad = [0, 0] * dims, [0, 0] * dims
        for k in range(dims):
            rows = gy.shape[2 + k] if k == 0 else spatial[k]
            wanted = (rows - 1) * geometry.stride[k] + geometry.extent(k)
            if k == 0:
                wanted = -(-wanted // geometry.stride[0]) * geometry.stride[0]
                out_rows = wanted // geometry.stride[0]
            else:
                out_rows = rows
            slot = 2 * (dims - 1 - k)  # F.pad counts dimensions from the last
            x_pad[slot], x_pad[slot + 1] = own.padding[k], wanted - own.padding[k] - x.shape[2 + k]
            gy_pad[slot + 1] = out_rows - gy.shape[2 + k]
        inputs.append(F.pad(x, x_pad))
        backprops.append(F.pad(gy, gy_pad))
    x, gy = torch.cat(inputs, 2), torch.cat(backprops, 2)
    rows = (x.shape[2] - geometry.extent(0)) // geometry.stride[0] + 1
    return replace(terms[0], inputs=x, backprops=gy[:, :, :rows], geometry=geometry)
