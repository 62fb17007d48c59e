"""The ways that others take per-example norms, as few calls of torch as each allows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engm.terms import ConvGeometry, conv_weight_gradient

from .layers import ConvLayer
from .record import Absent

LARGEST = 24e9  # bytes that a peer may need for a single layer


def square_sum(grads: Tensor) -> Tensor:
    """``[n, ...]`` to ``[n]``."""
    return grads.flatten(1).float().square().sum(1)


def unfold(layer: ConvLayer, x: Tensor, gy: Tensor) -> Tensor:
    """Unfold, batched matrix product, square and sum."""
    patches = F.unfold(x, layer.kernel, padding=layer.padding, stride=layer.stride)
    return square_sum(torch.bmm(gy.flatten(2), patches.transpose(1, 2)))


def grouped_backward(layer: ConvLayer, x: Tensor, gy: Tensor) -> Tensor:
    """The weight gradient of one convolution with a group an example."""
    n = len(x)
    weight = x.new_empty(1).expand(n * layer.rows, layer.channels, layer.kernel, layer.kernel)
    both = [layer.stride] * 2, [layer.padding] * 2, [1, 1]
    inputs, backprops = x.reshape(1, -1, *x.shape[2:]), gy.reshape(1, -1, *gy.shape[2:])
    mask = [False, True, False]
    grads = torch.ops.aten.convolution_backward(backprops, inputs, weight, None, *both, False, [0, 0], n, mask)[1]
    return square_sum(grads.view(n, -1))


def grouped_forward(layer: ConvLayer, x: Tensor, gy: Tensor) -> Tensor:
    """A forward convolution with n·C groups whose kernels are the backprops (Rochette et al., 2019)."""
    n, channels = x.shape[:2]
    needed = x.element_size() * n * channels * gy[0].numel()
    if needed > LARGEST:
        raise Absent(f"the expanded backprops alone would take {needed / 1e9:.0f} GB")
    if needed > 4 * 2**31:
        raise Absent("cuDNN 9.19 reads outside of operands of more than 2^31 elements here, which ends the process")
    kernels = gy.unsqueeze(1).expand(n, channels, *gy.shape[1:]).reshape(-1, 1, *gy.shape[2:])
    images = x.reshape(1, -1, *x.shape[2:])
    grads = F.conv2d(images, kernels, padding=layer.padding, dilation=layer.stride, groups=n * channels)
    return square_sum(grads[..., : layer.kernel, : layer.kernel].reshape(n, -1))


def opacus_conv(layer: ConvLayer, x: Tensor, gy: Tensor) -> Callable[[], Tensor]:
    """Opacus' own sampler for a convolution, and the norm of what it returns."""
    try:
        from opacus.grad_sample.conv import compute_conv_grad_sample
    except ImportError:
        raise Absent("opacus is not installed") from None
    module = nn.Conv2d(layer.channels, layer.rows, layer.kernel, layer.stride, layer.padding, bias=False)
    module = module.to(x.device, x.dtype)
    return lambda: square_sum(compute_conv_grad_sample(module, [x], gy)[module.weight])


def opacus_linear(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """Opacus' ghost norm of a linear layer."""
    try:
        from opacus.grad_sample.linear import compute_linear_norm_sample
    except ImportError:
        raise Absent("opacus is not installed") from None
    module = nn.Linear(a.shape[2], b.shape[2], bias=False).to(a.device, a.dtype)
    return lambda: compute_linear_norm_sample(module, [a], b)[module.weight].float().square()


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product, square and sum."""
    return square_sum(torch.bmm(b.transpose(1, 2), a))


def gram_bmm(a: Tensor, b: Tensor) -> Tensor:
    """Two Gram matrices, multiplied and summed (ghost clipping)."""
    products = torch.bmm(a, a.transpose(1, 2)).float() * torch.bmm(b, b.transpose(1, 2)).float()
    return products.sum((1, 2))


def summed_conv(layer: ConvLayer, x: Tensor, gy: Tensor) -> Tensor:
    """What plain training pays for a convolution: the weight gradient summed over the batch."""
    kernel, stride, padding, dilation, groups = layer.geometry
    geometry = ConvGeometry(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups)
    return conv_weight_gradient(x, gy, geometry)


def summed_linear(a: Tensor, b: Tensor) -> Tensor:
    """What plain training pays for a linear layer: one GEMM."""
    return b.flatten(0, 1).T @ a.flatten(0, 1)
