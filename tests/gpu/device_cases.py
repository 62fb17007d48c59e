"""What the tests on a GPU share: precisions with their tolerances, operands in awkward layouts, one case an operator.

Set ENGM_TEST_DEVICE=cpu to run whatever does not need CUDA itself on the CPU: a rehearsal of the tests, not of the
kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import engm
from engm import ops, reference

DEVICE = torch.device(os.environ.get("ENGM_TEST_DEVICE", "cuda"))
ON_CUDA = DEVICE.type == "cuda"


def obstacle() -> str | None:
    """Why nothing here can run, or None."""
    if not ON_CUDA:
        return None
    if not engm.build_info()["cuda"]:
        return "engm was built without CUDA kernels (see setup.py)"
    return None if torch.cuda.is_available() else "no CUDA device here"


gpu = [pytest.mark.gpu, pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))]
cuda_only = pytest.mark.skipif(not ON_CUDA, reason="a rehearsal on the CPU has no streams, graphs or CUDA allocator")


@dataclass(frozen=True)
class Mode:
    """An operand type and what may happen to it; ``tolerance`` is the relative error of a norm (design section 7)."""

    name: str
    dtype: torch.dtype
    tolerance: float
    tf32: bool = False

    def __str__(self) -> str:
        return self.name


MODES = [
    Mode("float64", torch.float64, 1e-9),
    Mode("float32", torch.float32, 1e-5),
    Mode("tf32", torch.float32, 1e-3, tf32=True),
    Mode("bfloat16", torch.bfloat16, 5e-3),
    Mode("float16", torch.float16, 5e-3),
]
every_mode = pytest.mark.parametrize("mode", MODES, ids=str)


@contextmanager
def tf32(matmul: bool, convolution: bool | None = None) -> Iterator[None]:
    """What torch allows TF32 for; linear operators follow the first switch, convolutions the second."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = matmul if convolution is None else convolution
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "offset", "trimmed", "expanded", "every other"]


def operand(shape: Any, dtype: torch.dtype, layout: str = "contiguous", mean: float = 0.0) -> Tensor:
    """Random numbers on the device, in one of several memory layouts, most of them not aligned to 16 bytes."""
    shape = tuple(shape)
    t = (torch.randn(shape, device=DEVICE) + mean).to(dtype)
    if layout == "channels_last" and t.dim() in (4, 5):
        return t.to(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":  # last stride 2
        return torch.stack([t, t], -1).flatten(-2)[..., ::2]
    if layout == "offset":  # dense, but one element past an aligned address
        storage = torch.empty(t.numel() + 1, dtype=dtype, device=DEVICE)
        storage[1:] = t.reshape(-1)
        return storage[1:].view(shape)
    if layout == "trimmed":  # rows of odd pitch
        return torch.cat([t[..., :1], t], -1)[..., 1:]
    if layout == "expanded":  # stride 0, as the backprops of a mean have
        return t[..., :1].expand(shape)
    if layout == "every other":  # examples far apart
        return torch.stack([t, t], 1)[:, 0]
    return t


def wide(value: Any) -> Any:
    """Floating tensors (also in lists) in float64, everything else as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return [wide(v) for v in value] if isinstance(value, list) and value and isinstance(value[0], Tensor) else value


def linear_terms(a: Tensor, b: Tensor, correction: dict[str, Tensor] | None = None) -> Tensor:
    """``[n]``, squared size of the terms that a norm is summed from; a norm far below them has cancelled."""
    terms = (a.double().square().sum(2) * b.double().square().sum(2)).sum(1)
    return terms + _correction_terms(correction)


def conv_terms(x: Tensor, gy: Tensor, geometry: Any, correction: dict[str, Tensor] | None = None) -> Tensor:
    """The same for a convolution."""
    kernel, stride, padding, dilation, groups = geometry
    ones = torch.ones(groups, x.shape[1] // groups, *kernel, dtype=torch.float64, device=x.device)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    patches = convolve(x.double().square(), ones, None, stride, padding, dilation, groups)
    backprops = gy.double().square().unflatten(1, (groups, -1)).sum(2)
    return (patches * backprops).flatten(1).sum(1) + _correction_terms(correction)


def _correction_terms(correction: dict[str, Tensor] | None) -> Tensor | float:
    if not correction:
        return 0.0
    shift, mean, scale, correlation = (correction[k].double() for k in ("shift", "patch_mean", "scale", "correlation"))
    rows = correlation.flatten(1).square().sum(1)
    return shift.square().sum(1) * mean.square().sum() + (scale.square() * rows).sum(1)


def assert_norms(got: Tensor, want: Tensor, mode: Mode, terms: Tensor | float = 0.0) -> None:
    """Squared norms within ``mode.tolerance`` of the norm, or of the size of the terms where those cancelled."""
    assert got.dtype == (torch.float64 if mode.dtype == torch.float64 else torch.float32)
    assert got.device.type == DEVICE.type
    size = torch.maximum(want, torch.as_tensor(terms, dtype=torch.float64, device=want.device))
    error = (got.double() - want).abs()
    worst = float((error / (2 * size).clamp_min(1e-300)).max()) if len(want) else 0.0
    assert bool((error <= 2 * mode.tolerance * size).all()), f"{mode}: relative error of a norm {worst:.2e}"


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    """Frobenius error of every tensor, relative to the wanted one."""
    pairs = zip(got, want, strict=True) if isinstance(got, list | tuple) else [(got, want)]
    for left, right in pairs:
        assert left.shape == right.shape
        assert not bool(left.isnan().any())
        error, size = float((left.double() - right).norm()), float(right.norm())
        assert error <= tolerance * size, f"relative error {error / max(size, 1e-300):.2e}, allowed {tolerance:.0e}"


def correction_of(n: int, d: int, patch: Any, weight: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The four arguments of the local batch-norm correction; ``patch`` and ``weight`` are shapes."""
    return {
        "shift": operand((n, d), dtype),
        "patch_mean": operand(patch, dtype),
        "scale": operand((n, d), dtype),
        "correlation": operand(weight, dtype),
    }


def output_size(size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> list[int]:
    """Spatial size of a convolution's output."""
    zipped = zip(size, kernel, stride, padding, dilation, strict=True)
    return [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, k, t, p, d in zipped]


@dataclass(frozen=True)
class Case:
    """One call of one operator: ``op(*arguments)``, with the same name in ``engm.reference``."""

    label: str
    name: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return self.label

    @property
    def op(self) -> Callable[..., Any]:
        return getattr(ops, self.name)

    @property
    def dispatched(self) -> Any:
        return getattr(torch.ops.engm, self.name).default

    def run(self) -> Any:
        return self.op(*self.arguments)

    def expected(self) -> Any:
        return getattr(reference, self.name)(*[wide(argument) for argument in self.arguments])


def every_operator(dtype: torch.dtype = torch.float32, n: int = 3) -> list[Case]:
    """Each operator on small odd shapes, in each of its forms; ``n`` examples."""
    linear = (operand((n, 7, 19), dtype), operand((n, 7, 13), dtype))
    conv = (operand((n, 6, 9, 7), dtype), operand((n, 10, 5, 7), dtype))
    geometry = ([3, 3], [2, 1], [1, 1], [1, 1], 2)
    nhwc = tuple(t.to(memory_format=torch.channels_last) for t in conv)
    token = (torch.randint(0, 5, (n, 11), device=DEVICE), operand((n, 11, 17), dtype))
    weights = torch.rand(n, device=DEVICE).to(torch.float64 if dtype == torch.float64 else torch.float32)
    squares = torch.rand(9, n, device=DEVICE).to(weights.dtype)
    tensors = [operand((n, 5), dtype), operand((n, 3, 4, 7), dtype), operand((n, 1), dtype), nhwc[0]]
    linear_correction = tuple(correction_of(n, 13, (19,), (13, 19), dtype).values())
    conv_correction = tuple(correction_of(n, 10, (6, 3, 3), (10, 3, 3, 3), dtype).values())
    wide_linear = (operand((n, 72, 136), dtype), operand((n, 72, 264), dtype))  # aligned, several tiles
    wide_conv = (operand((n, 32, 12, 16), dtype), operand((n, 72, 12, 16), dtype))
    wide_nhwc = tuple(t.to(memory_format=torch.channels_last) for t in wide_conv)
    same = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    patches = (operand((n, 5, 13, 11), dtype), operand((n, 9, 3, 5), dtype))
    tiling = ([4, 2], [4, 2], [0, 0], [1, 1], 1)
    line, volume = operand((n, 4, 33), dtype), operand((n, 3, 5, 6, 4), dtype)
    channels, rows = (
        torch.rand(3, 6, device=DEVICE).to(weights.dtype),
        torch.rand(2, n, 6, device=DEVICE).to(weights.dtype),
    )
    return [
        *[Case(f"linear_norm_sq {form}", "linear_norm_sq", (*linear, form)) for form in ("auto", "direct", "gram")],
        Case("linear_norm_sq corrected", "linear_norm_sq", (*linear, "direct", *linear_correction)),
        Case("linear_norm_sq T=1", "linear_norm_sq", (linear[0][:, :1], linear[1][:, :1])),
        Case("linear_grads", "linear_grads", linear),
        *[Case(f"conv_norm_sq {f}", "conv_norm_sq", (*conv, *geometry, f)) for f in ("auto", "direct", "gram")],
        *[Case(f"conv_norm_sq nhwc {f}", "conv_norm_sq", (*nhwc, *geometry, f)) for f in ("direct", "gram")],
        Case("conv_norm_sq corrected", "conv_norm_sq", (*conv, *geometry, "direct", *conv_correction)),
        Case("conv_norm_sq 1-d", "conv_norm_sq", (line, operand((n, 8, 32), dtype), [4], [1], [1], [1], 4)),
        Case("conv_norm_sq 3-d", "conv_norm_sq", (
            volume, operand((n, 5, 3, 4, 2), dtype), [3] * 3, [1] * 3, [0] * 3, [1] * 3)),
        Case("conv_grads", "conv_grads", (*conv, *geometry)),
        *[Case(f"conv_norm_sq patches {f}", "conv_norm_sq", (*patches, *tiling, f)) for f in ("direct", "gram")],
        Case("conv_grads patches", "conv_grads", (*patches, *tiling)),
        *[Case(f"linear_norm_sq aligned {f}", "linear_norm_sq", (*wide_linear, f)) for f in ("direct", "gram")],
        Case("linear_grads aligned", "linear_grads", wide_linear),
        *[Case(f"conv_norm_sq aligned {f}", "conv_norm_sq", (*wide_conv, *same, f)) for f in ("direct", "gram")],
        *[Case(f"conv_norm_sq aligned nhwc {f}", "conv_norm_sq", (*wide_nhwc, *same, f)) for f in ("direct", "gram")],
        Case("conv_grads aligned", "conv_grads", (*wide_conv, *same)),
        Case("conv_grads aligned nhwc", "conv_grads", (*wide_nhwc, *same)),
        Case("weighted_gemm aligned", "weighted_gemm", (*wide_linear, weights)),
        Case("conv_grads nhwc", "conv_grads", (*nhwc, *geometry)),
        Case("affine_norm_sq", "affine_norm_sq", (
            operand((n, 6, 35), dtype), operand((n, 6, 35), dtype),
            operand((1, 6, 1), dtype), operand((1, 6, 1), dtype), 1)),
        Case("affine_norm_sq last", "affine_norm_sq", (
            operand((n, 35, 6), dtype), operand((n, 35, 6), dtype), None, operand((n, 35, 1), dtype), 2)),
        *[Case(f"correction_factors {name}", "correction_factors", (outputs, *channels, *rows)) for name, outputs in (
            ("first", conv[0].flatten(2)), ("last", nhwc[0].flatten(2)), ("linear", linear[0][:, 0, :6, None]))],
        *[Case(f"patch_mean {name}", "patch_mean", (x, *geometry[:4])) for name, x in (
            ("first", conv[0]), ("last", nhwc[0]), ("wide", wide_conv[0]), ("wide last", wide_nhwc[0]))],
        Case("patch_mean 3-d", "patch_mean", (volume, [3] * 3, [1] * 3, [0] * 3, [1] * 3)),
        Case("embedding_norm_sq", "embedding_norm_sq", token),
        Case("embedding_norm_sq padded", "embedding_norm_sq", (*token, 2)),
        Case("clip_weights", "clip_weights", (squares, 1.5)),
        Case("clip_weights factors", "clip_weights", (squares, 1.5, torch.rand(9, device=DEVICE).to(weights.dtype))),
        Case("scaled_accumulate", "scaled_accumulate", (*linear, weights.to(dtype))),
        Case("scaled_accumulate bias", "scaled_accumulate", (None, linear[1], weights.to(dtype))),
        Case("scale_examples", "scale_examples", (tensors, weights)),
        Case("weighted_sums", "weighted_sums", (tensors, weights)),
        Case("weighted_gemm", "weighted_gemm", (*linear, weights)),
    ]  # fmt: skip
