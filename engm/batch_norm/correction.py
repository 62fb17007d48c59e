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

import torch
from torch import Tensor

from .. import ops
from ..terms import ConvFactors, LinearFactors, LocalCorrection, PerExampleGradient, Term, conv_weight_gradient


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
    outputs = batch_norm.inputs
    factors = outputs.flatten(2) if outputs.dim() > 2 else outputs.unsqueeze(2)
    normalised, shift, scale = ops.correction_factors(
        factors, batch_norm.mean, batch_norm.rstd, batch_norm.gain, shift_gradients, scale_gradients
    )
    normalised = ops.in_type(normalised, term.backprops.dtype)
    if isinstance(term, ConvFactors):
        geometry = term.geometry
        correlation = conv_weight_gradient(term.inputs, normalised.view(outputs.shape), geometry)
        patch_mean = ops.patch_mean(
            term.inputs, geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation
        )
    else:
        correlation = torch.einsum("not,ntp->op", normalised, term.activations)
        patch_mean = term.activations.mean((0, 1))
    return LocalCorrection(shift, patch_mean, scale, correlation)
