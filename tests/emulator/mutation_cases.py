"""Small problems that a mutation has to show in: each raises unless the operators are right.

Operands are small integers: products and most sums are exact in every precision, and a single wrong element shows.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from emulator.gram_library import PRECISIONS as GRAM_PRECISIONS
from emulator.gram_library import Conv, Library
from torch import Tensor

from engm import reference

CASES: dict[str, Callable[[Any, ctypes.CDLL], None]] = {}
DTYPES = {"double": torch.float64, "float": torch.float32, "bfloat16": torch.bfloat16}


def case(function):
    CASES[function.__name__] = function
    return function


def for_each_dtype(function):
    """One case a dtype, the name with the dtype's behind it."""
    for name, dtype in DTYPES.items():
        CASES[f"{function.__name__}_{name}"] = lambda ops, library, dtype=dtype: function(ops, dtype)
    return function


def operand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randint(-3, 4, shape).to(dtype)


def check(got: Tensor, want: Tensor, tolerance: float | None = None) -> None:
    tolerance = tolerance or {torch.float64: 1e-12, torch.float32: 3e-6}.get(got.dtype, 1e-2)
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def conv(ops, x, gy, *geometry, form="direct"):
    check(ops.conv_norm_sq(x, gy, *geometry, 1, form), reference.conv_norm_sq(x.double(), gy.double(), *geometry))


@for_each_dtype
def convolution(ops, dtype):
    """Several steps, ragged tiles and halos, both memory orders and one of each, aligned and not."""
    for n, channels, h, w in ((2, 9, 14, 9), (2, 40, 12, 11), (1, 64, 18, 8), (1, 9, 2, 144)):
        x, gy = operand(n, channels, h, w, dtype=dtype), operand(n, 24, h, w, dtype=dtype)
        last = [t.to(memory_format=torch.channels_last) for t in (x, gy)]
        for operands in ((x, gy), last, (x, last[1])):
            conv(ops, *operands, [3, 3], [1, 1], [1, 1], [1, 1])


@for_each_dtype
def strided_convolution(ops, dtype):
    x, gy = operand(1, 8, 13, 17, dtype=dtype), operand(1, 8, 7, 5, dtype=dtype)
    conv(ops, x, gy, [3, 2], [2, 3], [2, 0], [2, 3])
    x, gy = operand(1, 8, 5, 6, 7, dtype=dtype), operand(1, 8, 3, 6, 7, dtype=dtype)
    conv(ops, x, gy, [3, 3, 3], [2, 1, 1], [1, 1, 1], [1, 1, 1])


@for_each_dtype
def linear(ops, dtype):
    a, b = operand(2, 150, 40, dtype=dtype), operand(2, 150, 72, dtype=dtype)
    check(ops.linear_norm_sq(a, b, "direct"), reference.linear_norm_sq(a.double(), b.double()))
    for got, want in zip(ops.linear_grads(a, b), reference.linear_grads(a.double(), b.double()), strict=True):
        check(got, want)
    conv(ops, operand(2, 40, 8, 16, dtype=dtype), operand(2, 72, 8, 16, dtype=dtype), [1, 1], [1, 1], [0, 0], [1, 1])


@case
def corrected(ops, _):
    x, gy = operand(2, 9, 8, 8), operand(2, 11, 8, 8)
    correction = {
        "shift": operand(2, 11),
        "patch_mean": operand(9, 3, 3),
        "scale": operand(2, 11),
        "correlation": operand(11, 9, 3, 3),
    }
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    want = reference.conv_norm_sq(x, gy, *geometry, **correction)
    check(ops.conv_norm_sq(x, gy, *geometry, "direct", **correction), want)
    for got, want in zip(ops.conv_grads(x, gy, *geometry), reference.conv_grads(x, gy, *geometry), strict=True):
        check(got, want)
    x, gy, geometry = operand(1, 3, 4, 5, 6), operand(1, 4, 3, 4, 5), ([2, 2, 2], [1] * 3, [0] * 3, [1] * 3, 1)
    for got, want in zip(ops.conv_grads(x, gy, *geometry), reference.conv_grads(x, gy, *geometry), strict=True):
        check(got, want)


@case
def rounded_to_tf32(ops, _):
    """Numbers that TF32 does not hold, aligned and not; the oracle takes them to the nearest that it does."""
    for channels in (8, 9):
        x, gy = torch.randn(1, channels, 9, 8), torch.randn(1, 24, 9, 8)
        nearest = [((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double() for t in (x, gy)]
        want = reference.conv_norm_sq(*nearest, [3, 3], [1, 1], [1, 1], [1, 1])
        for memory in (torch.contiguous_format, torch.channels_last):
            inputs = [t.contiguous(memory_format=memory) for t in (x, gy)]
            check(ops.conv_norm_sq(*inputs, [3, 3], [1, 1], [1, 1], [1, 1], 1, "direct"), want)


@for_each_dtype
def gram_of_linear(ops, dtype):
    for T, p, d in ((100, 40, 24), (20, 150, 70), (5, 9, 8), (65, 8, 8)):
        a, b = operand(2, T, p, dtype=dtype), operand(2, T, d, dtype=dtype)
        check(ops.linear_norm_sq(a, b, "gram"), reference.linear_norm_sq(a.double(), b.double()), 1e-5)


@case
def contraction_by_itself(_, library):
    """Without its way back to the direct form, which would hide faults that make sums unreliable."""
    gram = Library(library)
    for name in ("float64", "float32", "bfloat16"):
        for positions in (5, 20, 64, 66, 131):
            rows = [torch.randn(2, positions, width, dtype=torch.float64) for width in (12, 9)]
            p, q = (r @ r.transpose(1, 2) for r in rows)
            assert gram.check_contraction(p, q, GRAM_PRECISIONS[name]) == [1, 1]
            nearly_zero = rows[1] - rows[1].mean(1, keepdim=True)
            means = torch.full_like(p, 1e6) + p
            q = nearly_zero @ nearly_zero.transpose(1, 2)
            assert gram.contract(means, q, GRAM_PRECISIONS[name])[1] == [0, 0]


@for_each_dtype
def gram_of_pointwise(ops, dtype):
    """1×1 convolutions, whose pixels and positions are the same."""
    for channels, rows, h, w in ((40, 24, 10, 10), (150, 70, 4, 5)):
        x, gy = operand(2, channels, h, w, dtype=dtype), operand(2, rows, h, w, dtype=dtype)
        conv(ops, x, gy, [1, 1], [1, 1], [0, 0], [1, 1], form="gram")


@for_each_dtype
def gram_of_convolution(ops, dtype):
    for channels, rows, size in ((20, 33, 5), (9, 8, 11)):
        x, gy = operand(2, channels, size, size, dtype=dtype), operand(2, rows, size, size, dtype=dtype)
        conv(ops, x, gy, [3, 3], [1, 1], [1, 1], [1, 1], form="gram")
        last = [t.to(memory_format=torch.channels_last) for t in (x, gy)]
        conv(ops, *last, [3, 3], [1, 1], [1, 1], [1, 1], form="gram")


@case
def gram_by_itself(_, library):
    """The Gram form without its way back to the direct form, which would hide faults that make sums unreliable."""
    gram = Library(library)
    for name in ("float64", "float32", "bfloat16"):
        precision = GRAM_PRECISIONS[name]
        for channels, rows, size, conv in (
            (20, 33, 5, Conv((3, 3), padding=(1, 1))),
            (16, 8, 11, Conv((3, 3), padding=(1, 1))),
            (150, 70, 20, Conv()),
            (40, 24, 100, Conv()),
        ):
            shape = (size,) * len(conv.kernel)
            x, gy = (
                torch.randn(2, channels, *shape).to(precision.dtype),
                torch.randn(2, rows, *shape).to(precision.dtype),
            )
            for last in (False, True):
                result = gram.check(*((channels_last(x), channels_last(gy)) if last else (x, gy)), conv, precision)
                assert result.reliable == [1, 1]


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


@case
def many_unreliable(ops, _):
    """Gram terms of constant activations cancel: a few blocks go through all tiles of the direct form."""
    a, b = torch.full((6, 120, 70), 8.0), operand(6, 120, 70, dtype=torch.float32)
    b[:, -1] -= b.sum(1) - 1
    check(ops.linear_norm_sq(a, b, "gram"), reference.linear_norm_sq(a.double(), b.double()))


@for_each_dtype
def gram_chunk_by_chunk(ops, dtype):
    """More taps than fit at once; some of them see nothing but padding."""
    x, gy = operand(1, 9, 13, 13, dtype=dtype), operand(1, 8, 2, 2, dtype=dtype)
    conv(ops, x, gy, [12, 12], [1, 1], [0, 0], [1, 1], form="gram")
    x, gy = operand(1, 2, 200, dtype=dtype), operand(1, 3, 349, dtype=dtype)
    conv(ops, x, gy, [150], [1], [149], [1], form="gram")


@for_each_dtype
def rank_one(ops, dtype):
    a, b = operand(3, 1, 704, dtype=dtype), operand(3, 1, 66, dtype=dtype)
    # Whole accesses; a rest behind them, and features that are no neighbours.
    for part, rows in ((a, b), (a[..., :701], b[..., ::2])):
        check(ops.linear_norm_sq(part, rows, "gram"), reference.linear_norm_sq(part.double(), rows.double()), 1e-5)


@for_each_dtype
def depthwise(ops, dtype):
    for kernel in (3, 4):
        x = operand(2, 35, 9, 8, dtype=dtype)
        gy = operand(2, 70, 9 - kernel + 3, 8 - kernel + 3, dtype=dtype)
        for memory in (torch.contiguous_format, torch.channels_last):
            inputs = [t.contiguous(memory_format=memory) for t in (x, gy)]
            geometry = ([kernel, kernel], [1, 1], [1, 1], [1, 1], 35)
            want = reference.conv_norm_sq(x.double(), gy.double(), *geometry)
            check(ops.conv_norm_sq(*inputs, *geometry, "direct"), want)


@for_each_dtype
def affine(ops, dtype):
    """Whole examples in a block and in parts, rows shorter and longer than its accesses, more channels than threads."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    for channels, positions in ((40, 63), (40, 64), (40, 400), (12, 16), (12, 205), (1102, 3)):
        x, gy = operand(3, channels, positions, dtype=dtype), operand(3, channels, positions, dtype=dtype)
        for statistic in ((1, channels, 1), (1, 1, positions)):
            mean, rstd = operand(*statistic, dtype=sums), operand(*statistic, dtype=sums)
            wants = reference.affine_norm_sq(*(t.double() for t in (x, gy, mean, rstd)), 1)
            for dim in (1, 2):
                inputs = [t if dim == 1 else t.transpose(1, 2).contiguous() for t in (x, gy, mean, rstd)]
                for got, want in zip(ops.affine_norm_sq(*inputs, dim), wants, strict=True):
                    check(got, want)


@for_each_dtype
def expanded(ops, dtype):
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    for shape, rows, last in (((2, 9, 5, 5), 11, False), ((2, 16, 4, 4), 40, True), ((2, 3, 2, 2), 5, False)):
        memory = torch.channels_last if last else torch.contiguous_format
        x, gy = operand(*shape, dtype=dtype), operand(shape[0], rows, *shape[2:], dtype=dtype)
        x, gy = x.contiguous(memory_format=memory), gy.contiguous(memory_format=memory)
        correction = {
            "shift": operand(2, rows, dtype=sums),
            "patch_mean": operand(shape[1], 3, 3, dtype=sums),
            "scale": operand(2, rows, dtype=sums),
            "correlation": operand(rows, shape[1], 3, 3, dtype=sums),
        }
        geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
        want = reference.conv_norm_sq(
            x.double(), gy.double(), *geometry, **{k: t.double() for k, t in correction.items()}
        )
        check(ops.conv_norm_sq(x, gy, *geometry, "gram", **correction), want)


@for_each_dtype
def correction(ops, dtype):
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    channels, rows = operand(3, 40, dtype=sums), operand(2, 3, 40, dtype=sums)
    for positions in (63, 504):
        drawn = operand(3, 40, positions, dtype=dtype)
        for outputs in (drawn, drawn.transpose(1, 2).contiguous().transpose(1, 2)):
            wants = reference.correction_factors(*(t.double() for t in (outputs, *channels, *rows)))
            for got, want in zip(ops.correction_factors(outputs, *channels, *rows), wants, strict=True):
                check(got, want)
    for shape, *geometry in (
        ((3, 35, 14, 9), [3, 3], [1, 1], [1, 1], [1, 1]),
        ((2, 5, 14, 11), [3, 3], [1, 1], [1, 1], [1, 1]),
        ((5, 64, 2, 2), [3, 3], [1, 1], [1, 1], [1, 1]),
        ((3, 8, 19, 17), [3, 4], [2, 3], [2, 1], [2, 3]),
    ):
        x = operand(*shape, dtype=dtype)
        for memory in (torch.contiguous_format, torch.channels_last):
            check(
                ops.patch_mean(x.contiguous(memory_format=memory), *geometry),
                reference.patch_mean(x.double(), *geometry),
            )


@for_each_dtype
def embedding(ops, dtype):
    for positions, channels in ((41, 300), (300, 5)):
        indices, gy = torch.randint(0, 5, (2, positions)), operand(2, positions, channels, dtype=dtype)
        indices[:, -1] = 5  # alone, and the last of fewer positions than a warp takes at once
        for padding in (-1, 3):
            want = reference.embedding_norm_sq(indices, gy.double(), padding)
            check(ops.embedding_norm_sq(indices, gy, padding), want)


@for_each_dtype
def weighting(ops, dtype):
    # One aligned, one not, one of several tiles; more examples than a block has under way.
    tensors = [operand(75, 5, 16, dtype=dtype), operand(75, 7, dtype=dtype), operand(75, 2500, dtype=dtype)]
    weights = operand(75, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for name in ("scale_examples", "weighted_sums"):
        wants = getattr(reference, name)([t.double() for t in tensors], weights.double())
        for got, want in zip(getattr(ops, name)(tensors, weights), wants, strict=True):
            check(got, want)


@for_each_dtype
def gemm(ops, dtype):
    """Ragged tiles, and rows enough for several splits."""
    for T, p, d in ((30, 140, 72), (300, 20, 9)):
        a, b = operand(5, T, p, dtype=dtype), operand(5, T, d, dtype=dtype)
        weights = torch.randint(-2, 3, (5,)).to(torch.float64 if dtype == torch.float64 else torch.float32)
        check(ops.weighted_gemm(a, b, weights), reference.weighted_gemm(a.double(), b.double(), weights.double()))


@case
def gemm_in_tf32(ops, _):
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        gemm(ops, torch.float32)
    finally:
        matmul.allow_tf32 = before


@case
def clipping(ops, _):
    for dtype in (torch.float64, torch.float32):
        squares = torch.rand(5, 300, dtype=dtype)
        squares[:, 7], squares[:, 8], squares[2, 9], squares[4, 10] = 0.0, -1.0, torch.inf, torch.nan
        for factors in (None, torch.rand(5, dtype=torch.float64)):
            arguments = (squares, 1.0, factors)
            for got, want in zip(ops.clip_weights(*arguments), reference.clip_weights(*arguments), strict=True):
                torch.testing.assert_close(got, want, equal_nan=True)


@case
def many_tiles(ops, _):
    """More partial sums an example than a warp has lanes."""
    a, b = operand(3, 3, 300), operand(3, 3, 300)
    check(ops.linear_norm_sq(a, b, "direct"), reference.linear_norm_sq(a, b))


# m, n, k of one instruction, in the order of fragments.cpp.
POLICIES = {
    "tf32": (16, 8, 8),
    "tf32x3": (16, 8, 8),
    "bfloat16": (16, 8, 16),
    "float16": (16, 8, 16),
    "float64": (8, 8, 4),
}


def policy(library, which, rows_of_k):
    """The products of test_fragments.py."""
    m, n, k = (2 * size for size in list(POLICIES.values())[which])
    a, b, rows = operand(k, m), operand(k, n), torch.randperm(k).int()
    if which == 1:  # more than TF32 holds, so that the second product counts
        a[0], b[1] = 4097.0, 4097.0
    c = torch.empty(m, n, dtype=torch.float64)
    library.product.restype = ctypes.c_char_p
    error = library.product(which, rows_of_k, *(ctypes.c_void_p(t.data_ptr()) for t in (a, b, rows, c)))
    if error:
        raise RuntimeError(error.decode())
    check(c, a.t() @ b)


for index, name in enumerate(POLICIES):
    for rows_of_k in (True, False):
        CASES[f"policy_{name}_{'k' if rows_of_k else 'mn'}"] = lambda ops, library, index=index, rows_of_k=rows_of_k: (
            policy(library, index, rows_of_k)
        )
