"""What one layer call contributes to the gradient of each of its parameters, in the form it is cheapest to keep.

A *term* stands for the per-example gradients ``g_i`` of one parameter tensor without (usually) holding them:

==========================  =====================================  =========================================
term                        per-example gradient                   kept
==========================  =====================================  =========================================
:class:`PerExampleGradient` ``g_i`` itself                         ``[n, *shape]``: bias, scale, shift
:class:`LinearFactors`      ``B_i^T A_i``                          activations and backprops
:class:`ConvFactors`        ``B_i^T patches(X_i)``                 input and output gradient, never patches
==========================  =====================================  =========================================

A parameter used more than once has one term a use. :func:`combine` adds them *before* the norm is taken, which is
where the cross terms come from (design: adding the squared norms of the uses is wrong).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops


class UnsupportedTieError(RuntimeError):
    """A parameter is shared by uses whose gradients cannot be added in factored form."""


@dataclass
class LocalCorrection:
    """What one training-mode batch norm behind the layer subtracts from each ``G_i`` (design section 2.5).

    ``G_i[o] - shift[i, o] * patch_mean - scale[i, o] * correlation[o]``.

    Attributes:
        shift: ``[n, d]``, ``k m_i`` with ``k = scale / sigma`` of the batch norm and ``m_i`` its shift gradient.
        patch_mean: ``[C, *kernel]`` (linear: ``[p]``), the mean patch over batch and positions.
        scale: ``[n, d]``, ``k v_i`` with ``v_i`` the batch norm's scale gradient.
        correlation: ``[d, C / groups, *kernel]`` (linear: ``[d, p]``), the mean of ``xhat a^T``.
    """

    shift: Tensor
    patch_mean: Tensor
    scale: Tensor
    correlation: Tensor

    def as_arguments(self) -> dict[str, Any]:
        """Keyword arguments of :func:`engm.ops.linear_norm_sq` and :func:`engm.ops.conv_norm_sq`."""
        return {
            "shift": self.shift,
            "patch_mean": self.patch_mean,
            "scale": self.scale,
            "correlation": self.correlation,
        }


class Term:
    """Per-example gradients of one parameter, implicit. See the module's docstring."""

    def squared_norm(self) -> Tensor:
        """``||g_i||^2``, ``[n]``, in float32 or better."""
        raise TypeError(f"{type(self).__name__} must define squared_norm")

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """``sum_i weights_i g_i`` in the parameter's own shape."""
        raise TypeError(f"{type(self).__name__} must define weighted_sum")

    def compact(self) -> Term:
        """The smallest equivalent to keep until the weights are known.

        Where an example's gradient has fewer elements than its factors (a 3x3 convolution of 32 channels at 32x32:
        9,216 against 65,536) the gradient itself is formed, in the same pass that yields its norm. It takes less
        memory, and its weighted sum is one matrix-vector product instead of a second convolution.
        """
        return self


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 tensors, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclass
class PerExampleGradient(Term):
    """The per-example gradients themselves, ``[n, *parameter.shape]``; for small parameters."""

    gradient: Tensor
    norm_sq: Tensor | None = None

    def squared_norm(self) -> Tensor:
        if self.norm_sq is not None:
            return self.norm_sq
        flat = self.gradient.flatten(1)
        return flat.to(accumulation_dtype(flat)).square().sum(1)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return ops.weighted_sums([self.gradient], weights)[0]


def _cheaper_to_scale(backprops: Tensor, activations: Tensor) -> Tensor:
    """The smaller one; in float16 the backprops, which the loss scale keeps clear of underflow."""
    if backprops.dtype == torch.float16 or backprops.numel() <= activations.numel():
        return backprops
    return activations


class Factors(Term):
    """Two factors whose product is the gradient: weighting the examples of one weights the gradients."""

    def to_scale(self) -> Tensor:
        """The factor whose examples are weighted."""
        raise TypeError(f"{type(self).__name__} must define to_scale")

    def sum_of_scaled(self, scaled: Tensor) -> Tensor:
        """The sum over examples, given :meth:`to_scale` times the examples' weights."""
        raise TypeError(f"{type(self).__name__} must define sum_of_scaled")

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self.sum_of_scaled(ops.scale_examples([self.to_scale()], weights)[0])


@dataclass
class LinearFactors(Factors):
    """``g_i = B_i^T A_i`` with activations ``[n, T, p]`` and backprops ``[n, T, d]``."""

    activations: Tensor
    backprops: Tensor
    correction: LocalCorrection | None = None

    def squared_norm(self) -> Tensor:
        correction = self.correction.as_arguments() if self.correction else {}
        return ops.linear_norm_sq(self.activations, self.backprops, **correction)

    def compact(self) -> Term:
        positions, p, d = *self.activations.shape[1:], self.backprops.shape[2]
        if p * d >= positions * (p + d):
            return self
        norm_sq, gradients = ops.linear_grads(self.activations, self.backprops)
        return PerExampleGradient(gradients, norm_sq)

    def to_scale(self) -> Tensor:
        return _cheaper_to_scale(self.backprops, self.activations)

    def sum_of_scaled(self, scaled: Tensor) -> Tensor:
        left, right = self.backprops, self.activations
        left, right = (scaled, right) if self.to_scale() is left else (left, scaled)
        return left.flatten(0, 1).t() @ right.flatten(0, 1)


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution reads its (zero padded) input; one entry a spatial dimension."""

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


@dataclass
class ConvFactors(Factors):
    """``g_i = B_i^T patches(X_i)`` with input ``[n, C, *S]`` and output gradient ``[n, d, *S_out]``."""

    inputs: Tensor
    backprops: Tensor
    geometry: ConvGeometry
    correction: LocalCorrection | None = None

    def squared_norm(self) -> Tensor:
        geometry = self.geometry
        correction = self.correction.as_arguments() if self.correction else {}
        return ops.conv_norm_sq(
            self.inputs,
            self.backprops,
            geometry.kernel_size,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.groups,
            **correction,
        )

    def compact(self) -> Term:
        geometry = self.geometry
        gradient = self.backprops.shape[1] * (self.inputs.shape[1] // geometry.groups) * prod(geometry.kernel_size)
        if gradient * self.inputs.shape[0] >= self.inputs.numel() + self.backprops.numel():
            return self
        norm_sq, gradients = ops.conv_grads(
            self.inputs,
            self.backprops,
            geometry.kernel_size,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.groups,
        )
        return PerExampleGradient(gradients, norm_sq)

    def to_scale(self) -> Tensor:
        return _cheaper_to_scale(self.backprops, self.inputs)

    def sum_of_scaled(self, scaled: Tensor) -> Tensor:
        if self.to_scale() is self.backprops:
            return conv_weight_gradient(self.inputs, scaled, self.geometry)
        return conv_weight_gradient(scaled, self.backprops, self.geometry)


def conv_weight_gradient(inputs: Tensor, backprops: Tensor, geometry: ConvGeometry) -> Tensor:
    """Weight gradient summed over the batch, ``[d, C / groups, *kernel]``, by ATen (oneDNN, cuDNN)."""
    shape = (backprops.shape[1], inputs.shape[1] // geometry.groups, *geometry.kernel_size)
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


def weighted_sums(
    terms: list[tuple[Tensor, Term]], weights: Tensor, scaled_at_once: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """``(parameter, sum_i weights_i g_i)`` for every ``(parameter, term)``; the list is emptied on the way.

    Examples are weighted in groups of terms, on CUDA in one launch each: all gradients that were kept whole go
    together, because nothing of them is copied, and factors by as many as their scaled copies may take.

    Args:
        terms: emptied.
        weights: ``[n]``.
        scaled_at_once: bytes of scaled factors that may be held; a factor that takes more goes alone.
    """
    terms.sort(key=lambda item: isinstance(item[1], Factors))
    while terms:
        group = [terms.pop(0)]
        held = _bytes_to_scale(group[0])
        while terms and held + _bytes_to_scale(terms[0]) <= scaled_at_once:
            held += _bytes_to_scale(terms[0])
            group.append(terms.pop(0))
        yield from _sums_of_group(group, weights)


def _bytes_to_scale(item: tuple[Tensor, Term]) -> int:
    return item[1].to_scale().nbytes if isinstance(item[1], Factors) else 0


def _sums_of_group(group: list[tuple[Tensor, Term]], weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of terms that fit together; what is used is let go as early as can be."""
    whole = {parameter: term.gradient for parameter, term in group if isinstance(term, PerExampleGradient)}
    factors = [(parameter, term) for parameter, term in group if isinstance(term, Factors)]
    others = [(parameter, term) for parameter, term in group if not isinstance(term, PerExampleGradient | Factors)]
    group.clear()
    parameters, sums = list(whole), ops.weighted_sums(list(whole.values()), weights)
    whole.clear()
    yield from zip(parameters, sums, strict=True)
    scaled = ops.scale_examples([term.to_scale() for _, term in factors], weights)
    while factors:
        parameter, term = factors.pop(0)
        yield parameter, term.sum_of_scaled(scaled.pop(0))
    for parameter, other in others:
        yield parameter, other.weighted_sum(weights)


def combine(terms: Sequence[Term], name: str) -> Term:
    """One term whose per-example gradient is the sum of the given ones (several uses of one parameter).

    Args:
        terms: one term a use, of the same parameter and the same examples.
        name: the parameter's name, for the error.

    Raises:
        UnsupportedTieError: the uses are of different kinds (an embedding and a projection, two convolutions of
            different stride), so their factors cannot be laid side by side.
    """
    first = terms[0]
    if len(terms) == 1:
        return first
    if all(isinstance(term, PerExampleGradient) for term in terms):
        return PerExampleGradient(torch.stack([term.gradient for term in terms]).sum(0))  # type: ignore[attr-defined]
    if all(isinstance(term, LinearFactors) for term in terms):
        return LinearFactors(
            torch.cat([term.activations for term in terms], 1),  # type: ignore[attr-defined]
            torch.cat([term.backprops for term in terms], 1),  # type: ignore[attr-defined]
        )
    if all(isinstance(term, ConvFactors) for term in terms):
        convolutions: list[ConvFactors] = list(terms)  # type: ignore[arg-type]
        if len({term.geometry.without_padding() for term in convolutions}) == 1:
            return _side_by_side(convolutions)
    kinds = ", ".join(sorted({type(term).__name__ for term in terms}))
    raise UnsupportedTieError(
        f"parameter '{name}' is used by layers whose gradients cannot be combined ({kinds}, or convolutions of "
        "different kernel, stride, dilation or groups). Untie it, freeze it, or register one rule for both uses."
    )


def _side_by_side(terms: Sequence[ConvFactors]) -> ConvFactors:
    """Lay the uses of one convolution weight along the first spatial dimension of one image.

    Each input is padded, trimmed to the pixels that are read, and rounded up to a multiple of the stride, so that
    every use keeps its own output rows; the output rows that straddle two uses get a zero gradient. Norms and
    weighted sums of the result then hold the cross terms in every form.
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
    return ConvFactors(x, gy[:, :, :rows], geometry)
