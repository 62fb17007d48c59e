"""What every operator of :mod:`engm.ops` computes, in a few lines of plain torch that form every per-example gradient.

These twins are slow and plainly right, on any device and in any floating dtype: tests hold the compiled operators
against them. A twin takes the arguments of its operator; ``form`` is ignored.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _corrected(
    grads: Tensor, shift: Tensor | None, patch_mean: Tensor | None, scale: Tensor | None, correlation: Tensor | None
) -> Tensor:
    """Gradients ``[n, d, p]`` less ``shift * patch_mean + scale * correlation``; the last two are ``[d, p]``."""
    if shift is None or patch_mean is None or scale is None or correlation is None:
        return grads
    return grads - shift[..., None] * patch_mean - scale[..., None] * correlation


def linear_norm_sq(
    a: Tensor,
    b: Tensor,
    form: str = "auto",
    shift: Tensor | None = None,
    patch_mean: Tensor | None = None,
    scale: Tensor | None = None,
    correlation: Tensor | None = None,
) -> Tensor:
    """Twin of :func:`engm.ops.linear_norm_sq`."""
    grads = linear_grads(a, b)[1]
    return _corrected(grads, shift, patch_mean, scale, correlation).square().sum((1, 2))


def conv_norm_sq(
    x: Tensor,
    gy: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    form: str = "auto",
    shift: Tensor | None = None,
    patch_mean: Tensor | None = None,
    scale: Tensor | None = None,
    correlation: Tensor | None = None,
) -> Tensor:
    """Twin of :func:`engm.ops.conv_norm_sq`."""
    grads = conv_grads(x, gy, kernel_size, stride, padding, dilation, groups)[1].flatten(2)
    if patch_mean is not None and correlation is not None:
        patch_mean = patch_mean.reshape(groups, -1).repeat_interleave(gy.shape[1] // groups, 0)
        correlation = correlation.flatten(1)
    return _corrected(grads, shift, patch_mean, scale, correlation).square().sum((1, 2))


def linear_grads(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of :func:`engm.ops.linear_grads`."""
    grads = torch.einsum("ntd,ntp->ndp", b, a)
    return grads.square().sum((1, 2)), grads


def conv_grads(
    x: Tensor,
    gy: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Twin of :func:`engm.ops.conv_grads`."""
    n, d = gy.shape[:2]
    x = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
    for i, (k, s, dil) in enumerate(zip(kernel_size, stride, dilation, strict=True)):  # [n, C, *So, *kernel]
        x = x.unfold(i + 2, dil * (k - 1) + 1, s)[..., ::dil]
    patches = x.flatten(2 + len(stride)).flatten(2, -2).view(n, groups, x.shape[1] // groups, gy[0, 0].numel(), -1)
    grads = torch.einsum("ngdt,ngctk->ngdck", gy.reshape(n, groups, d // groups, -1), patches)
    return grads.square().sum((1, 2, 3, 4)), grads.reshape(n, d, x.shape[1] // groups, *kernel_size)


def affine_norm_sq(
    x: Tensor, gy: Tensor, mean: Tensor | None, rstd: Tensor, channel_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of :func:`engm.ops.affine_norm_sq`."""
    normalised = (x if mean is None else x - mean) * rstd
    scale_grads = (gy * normalised).sum(3 - channel_dim)
    shift_grads = gy.sum(3 - channel_dim)
    return torch.stack([scale_grads.square().sum(1), shift_grads.square().sum(1)]), scale_grads, shift_grads


def correction_factors(
    outputs: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of :func:`engm.ops.correction_factors`."""
    root = (outputs.shape[0] * outputs.shape[2]) ** 0.5
    return (outputs - mean[:, None]) * rstd[:, None] / root, shift * gain, scale * gain / root


def patch_mean(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Twin of :func:`engm.ops.patch_mean`."""
    x = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
    for i, (k, s, dil) in enumerate(zip(kernel_size, stride, dilation, strict=True)):  # [n, C, *So, *kernel]
        x = x.unfold(i + 2, dil * (k - 1) + 1, s)[..., ::dil]
    return x.mean((0, *range(2, 2 + len(stride))))


def embedding_norm_sq(indices: Tensor, gy: Tensor, padding_idx: int = -1) -> Tensor:
    """Twin of :func:`engm.ops.embedding_norm_sq`, with a table of the rows that occur."""
    rows, which = indices.unique(return_inverse=True)
    grads = gy.new_zeros(len(gy), len(rows), gy.shape[2])
    grads.scatter_add_(1, which.reshape(indices.shape)[..., None].expand(gy.shape), gy)
    keep = (rows != padding_idx) if padding_idx >= 0 else torch.ones_like(rows, dtype=torch.bool)
    return grads[:, keep].square().sum((1, 2))


def clip_weights(squared_norms: Tensor, alpha: float, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Twin of :func:`engm.ops.clip_weights`."""
    factors = torch.ones(len(squared_norms)) if factors is None else factors
    total = (factors.to(squared_norms.device, torch.float64)[:, None] * squared_norms.double()).sum(0)
    norms = torch.where(total == -torch.inf, torch.nan, total.clamp_min(0).sqrt())
    weights = torch.where(norms <= alpha, 1.0, alpha / norms).where(total.isfinite(), torch.nan)
    dtype = torch.promote_types(squared_norms.dtype, torch.float32)
    return norms.to(dtype), weights.to(dtype)


def position_sums(gradients: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Twin of :func:`engm.ops.position_sums`."""
    sums = gradients.sum(dim)
    return sums.square().sum(1), sums


def _cell(kind: str, of_inputs: Tensor, of_hidden: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
    """The state after a step, from the pre-activations ``[n, gates H]`` and the state before."""
    if kind == "GRU":
        (reset, update, new), (more, other, inner) = of_inputs.chunk(3, 1), of_hidden.chunk(3, 1)
        update = torch.sigmoid(update + other)
        return [update * state[0] + (1 - update) * torch.tanh(new + torch.sigmoid(reset + more) * inner)]
    if kind != "LSTM":
        return [getattr(torch, kind[4:].lower())(of_inputs + of_hidden)]
    enter, keep, new, out = (of_inputs + of_hidden).chunk(4, 1)
    cell = torch.sigmoid(keep) * state[1] + torch.sigmoid(enter) * torch.tanh(new)
    return [torch.sigmoid(out) * torch.tanh(cell), cell]


def recurrence(
    kind: str,
    inputs: Tensor,
    ih: Tensor,
    hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    hr: Tensor | None,
    state: Sequence[Tensor],
    present: Tensor | None = None,
    reverse: bool = False,
    more: Sequence[Tensor] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Twin of :func:`engm.ops.recurrence`: its outputs and the last state.

    ``more`` is added to ``W_hh h + b_hh``, ``W_ih x + b_ih`` and, with ``hr``, to the new hidden states.
    """
    outputs: dict[int, Tensor] = {}
    for t in reversed(range(inputs.shape[1])) if reverse else range(inputs.shape[1]):
        steps = F.linear(state[0], hh, bias_hh), F.linear(inputs[:, t], ih, bias_ih)
        of_hidden, of_inputs = (step + m[:, t] for step, m in zip(steps, more, strict=False)) if more else steps
        after = _cell(kind, of_inputs, of_hidden, state)
        if hr is not None:
            after[0] = after[0] @ hr.t() + (more[2][:, t] if more else 0)
        here = torch.ones_like(inputs[:, t, :1], dtype=torch.bool) if present is None else present[:, t, None]
        state = [torch.where(here, new, old) for new, old in zip(after, state, strict=True)]
        outputs[t] = state[0]
    return torch.stack([outputs[t] for t in range(inputs.shape[1])], 1), list(state)


def scaled_accumulate(a: Tensor | None, b: Tensor, weights: Tensor) -> Tensor:
    """Twin of :func:`engm.ops.scaled_accumulate`."""
    if a is None:
        return torch.einsum("n,ntd->d", weights, b)
    return torch.einsum("ndp,n->dp", torch.einsum("ntd,ntp->ndp", b, a), weights)


def scale_examples(tensors: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """Twin of :func:`engm.ops.scale_examples`."""
    shaped = [weights.view(-1, *[1] * (t.dim() - 1)) for t in tensors]
    return [
        (t * w.to(torch.promote_types(t.dtype, torch.float32))).to(t.dtype)
        for t, w in zip(tensors, shaped, strict=True)
    ]


def weighted_sums(tensors: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """Twin of :func:`engm.ops.weighted_sums`."""
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return [torch.tensordot(weights.to(t.dtype), t, dims=1) for t in wide]


def weighted_gemm(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Twin of :func:`engm.ops.weighted_gemm`."""
    return scaled_accumulate(a, b, weights)
