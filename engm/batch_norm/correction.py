"""The local correction: the exact backward pass of the one batch norm behind a linear or convolution layer.

A frozen backward pass gives the layer's output the gradient ``k dy`` (``k = scale / sigma``). The true one subtracts,
for every example ``j`` of the batch, ``k (m_i + xhat_j v_i) / N`` from it, with ``m_i = sum_t dy_it`` and
``v_i = sum_t dy_it xhat_it``. Summed against the patches of the whole batch this is

    G_i[o] - k m_i[o] mean(a) - k v_i[o] mean(xhat[o] a)

so two batch averages and the two small sums that the batch norm's own gradients are made of suffice (design 2.5).
The averages are over the whole batch: from a quarter of it their noise made the calibration factors age badly (on
CIFAR-10 the norms were off by another 15 % from one batch to the next, with the whole batch by 2 %).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor

from ..terms import (
    ConvFactors,
    LinearFactors,
    LocalCorrection,
    PerExampleGradient,
    Term,
    accumulation_dtype,
    conv_weight_gradient,
)


@dataclass(frozen=True)
class BatchNormCall:
    """What one batch norm read and normalised with.

    Attributes:
        inputs: ``[n, d, *S]``, the output of the layer in front of the batch norm.
        mean: ``[d]``, of the inputs.
        rstd: ``[d]``, reciprocal standard deviation of the inputs.
        gain: ``[d]``, ``scale / sigma``.
    """

    inputs: Tensor
    mean: Tensor
    rstd: Tensor
    gain: Tensor


def correct_terms(
    terms: dict[str, Term], batch_norm: BatchNormCall, shift_gradients: Tensor, scale_gradients: Tensor
) -> None:
    """Correct the layer's terms in place: a weight by :func:`local_correction`, a bias as if its patches were 1.

    The mean of such patches is 1 and their correlation with the normalised output 0, so a bias loses ``k m_i``, which
    is all of its gradient that went through the batch norm.
    """
    for term in terms.values():
        if isinstance(term, LinearFactors | ConvFactors):
            term.correction = local_correction(term, batch_norm, shift_gradients, scale_gradients)
        elif isinstance(term, PerExampleGradient):
            term.gradient = term.gradient - (shift_gradients * batch_norm.gain).to(term.gradient.dtype)
            term.norm_sq = None


def local_correction(
    term: LinearFactors | ConvFactors, batch_norm: BatchNormCall, shift_gradients: Tensor, scale_gradients: Tensor
) -> LocalCorrection:
    """What the batch norm behind a layer subtracts from the per-example gradients of the layer's weight.

    Args:
        term: the layer's factors, uncorrected.
        batch_norm: the batch norm that read the layer's output, in training mode.
        shift_gradients: ``[n, d]``, the batch norm's per-example shift gradients ``m``.
        scale_gradients: ``[n, d]``, its per-example scale gradients ``v``.
    """
    gain, mean, rstd, outputs = batch_norm.gain, batch_norm.mean, batch_norm.rstd, batch_norm.inputs
    shape = [1, -1] + [1] * (outputs.dim() - 2)
    # Half of the mean's division comes before the sum: over a batch's positions it would leave the range of float16.
    root = sqrt(len(outputs) * prod(outputs.shape[2:]))
    xhat = ((outputs - mean.view(shape)) * (rstd / root).view(shape)).to(term.backprops.dtype)
    if isinstance(term, ConvFactors):
        correlation = conv_weight_gradient(term.inputs, xhat, term.geometry) / root
        patch_mean = _patch_mean(term, outputs.shape[2:])
    else:
        xhat = xhat.unsqueeze(1)
        correlation = torch.einsum("nto,ntp->op", xhat, term.activations) / root
        patch_mean = term.activations.mean((0, 1))
    return LocalCorrection(shift_gradients * gain, patch_mean, scale_gradients * gain, correlation)


def _patch_mean(term: ConvFactors, output_size: tuple[int, ...]) -> Tensor:
    """Mean patch over batch and positions, ``[C, *kernel]``: the weight gradient of a constant output gradient."""
    geometry = term.geometry
    mean_image = term.inputs.mean(0, keepdim=True, dtype=accumulation_dtype(term.inputs))
    ones = mean_image.new_ones((1, 1, *output_size))
    dense = type(geometry)(geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation, 1)
    return conv_weight_gradient(mean_image, ones, dense)[0] / prod(output_size)
