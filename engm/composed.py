"""The norm operators composed from torch's, some examples at a time: for devices that have no kernel of ours yet.

Registered for CUDA when this module is imported; the first use of each warns.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .ops import compute_type

CHUNK_ELEMENTS = 1 << 24  # of per-example gradient and patches at once
_ANNOUNCED: set[str] = set()


def _in_chunks(
    a: Tensor, b: Tensor, shift: Tensor | None, scale: Tensor | None, elements: int, norms: Callable
) -> Tensor:
    """``norms`` of as many examples at once as a bound on ``elements`` each allows, in float32 or float64."""
    dtype, step = compute_type(a), max(1, CHUNK_ELEMENTS // max(1, elements))
    parts = [
        norms(*(None if t is None else t[i : i + step].to(dtype) for t in (a, b, shift, scale)))
        for i in range(0, a.shape[0], step)
    ]
    return torch.cat(parts) if parts else a.new_zeros(0, dtype=dtype)


def linear_norm_sq(
    a: Tensor,
    b: Tensor,
    form: str = "auto",
    shift: Tensor | None = None,
    patch_mean: Tensor | None = None,
    scale: Tensor | None = None,
    correlation: Tensor | None = None,
) -> Tensor:
    """As :func:`engm.ops.linear_norm_sq`."""

    def norms(a: Tensor, b: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        return reference.linear_norm_sq(a, b, form, shift, patch_mean, scale, correlation)

    return _in_chunks(a, b, shift, scale, a.shape[2] * b.shape[2], norms)


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
    """As :func:`engm.ops.conv_norm_sq`; the patches of a chunk are unfolded."""

    def norms(x: Tensor, gy: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        geometry = (kernel_size, stride, padding, dilation, groups, form)
        return reference.conv_norm_sq(x, gy, *geometry, shift, patch_mean, scale, correlation)

    columns = x.shape[1] * math.prod(kernel_size)
    return _in_chunks(x, gy, shift, scale, columns * (math.prod(gy.shape[2:]) + gy.shape[1] // groups), norms)


def _grads_in_chunks(
    a: Tensor, b: Tensor, shape: Sequence[int], elements: int, grads: Callable
) -> tuple[Tensor, Tensor]:
    """As :func:`_in_chunks`, for gradients of one ``shape`` an example."""
    n, dtype, step = a.shape[0], compute_type(a), max(1, CHUNK_ELEMENTS // max(1, elements))
    norm_sq, out = a.new_empty(n, dtype=dtype), a.new_empty(n, *shape, dtype=dtype)
    for i in range(0, n, step):
        rows = slice(i, i + step)
        norm_sq[rows], out[rows] = grads(a[rows].to(dtype), b[rows].to(dtype))
    return norm_sq, out


def linear_grads(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`engm.ops.linear_grads`."""
    d, p = b.shape[2], a.shape[2]
    return _grads_in_chunks(a, b, (d, p), d * p, reference.linear_grads)


def conv_grads(
    x: Tensor,
    gy: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """As :func:`engm.ops.conv_grads`."""

    def grads(x: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
        return reference.conv_grads(x, gy, kernel_size, stride, padding, dilation, groups)

    shape = (gy.shape[1], x.shape[1] // groups, *kernel_size)
    elements = x.shape[1] * math.prod(kernel_size) * math.prod(gy.shape[2:]) + math.prod(shape)
    return _grads_in_chunks(x, gy, shape, elements, grads)


def affine_norm_sq(
    x: Tensor, gy: Tensor, mean: Tensor | None, rstd: Tensor, channel_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`engm.ops.affine_norm_sq`."""
    dtype = compute_type(x)
    mean = None if mean is None else mean.to(dtype)
    return reference.affine_norm_sq(x.to(dtype), gy.to(dtype), mean, rstd.to(dtype), channel_dim)


def _announced(name: str, composed: Callable[..., Any]) -> Callable[..., Any]:
    """``composed``, which says once that it is not the fast way."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if name not in _ANNOUNCED:
            _ANNOUNCED.add(name)
            warnings.warn(
                f"engm has no CUDA kernel for {name} yet: it is composed from torch operators, chunk by chunk, "
                "which is right but slow.",
                stacklevel=2,
            )
        return composed(*args, **kwargs)

    return run


for _composed in (linear_norm_sq, conv_norm_sq, linear_grads, conv_grads, affine_norm_sq):
    torch.library.impl(f"engm::{_composed.__name__}", "CUDA", _announced(_composed.__name__, _composed))
