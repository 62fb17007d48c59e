"""The CUDA kernels of scale_examples, weighted_sums and weighted_gemm against their twins, run by the emulator."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_problems import operand
from weighting_problems import (
    BAD_LISTS,
    DTYPES,
    assert_sums_close,
    check_scaled,
    check_sums,
    dtypes,
    layouts,
    lists_to_weight,
    sum_type,
)

from engm import reference

EXAMPLES = settings(max_examples=80, deadline=None)


@EXAMPLES
@given(problem=lists_to_weight())
def test_scale_examples_is_its_twin(emulated, problem):
    check_scaled(emulated.scale_examples(*problem), *problem)


@EXAMPLES
@given(problem=lists_to_weight())
def test_weighted_sums_is_its_twin(emulated, problem):
    check_sums(emulated.weighted_sums(*problem), *problem)


@pytest.mark.parametrize(("op", "check"), [("scale_examples", check_scaled), ("weighted_sums", check_sums)])
def test_lists_longer_than_a_launch(emulated, op, check):
    tensors = [operand((2, 1 + k % 5), DTYPES[k % 4]) for k in range(211)]
    tensors[50:50] = [torch.zeros(2, 0)] * 3
    weights = torch.rand(2)
    check(getattr(emulated, op)(tensors, weights), tensors, weights)


@pytest.mark.parametrize(("op", "check"), [("scale_examples", check_scaled), ("weighted_sums", check_sums)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pointers_that_are_not_aligned(emulated, op, check, dtype):
    whole = torch.randn(1 + 3 * 64).to(dtype)
    tensors, weights = [whole[1:].view(3, 64), whole[:-1].view(3, 64)], torch.rand(3)
    check(getattr(emulated, op)(tensors, weights), tensors, weights)


@pytest.mark.parametrize("per_example", [8, 24, 4096, 5000, 5001, 20000])
def test_examples_shorter_and_longer_than_a_tile(emulated, per_example):
    """A tile of 16 KB holds many examples, one border, or none."""
    tensors = [operand((5, per_example), dtype) for dtype in (torch.float32, torch.bfloat16)]
    weights = torch.rand(5)
    check_scaled(emulated.scale_examples(tensors, weights), tensors, weights)
    check_sums(emulated.weighted_sums(tensors, weights), tensors, weights)


def test_sums_are_repeatable(emulated):
    tensors, weights = [torch.randn(40, 300), torch.randn(40, 7)], torch.rand(40)
    first, second = (emulated.weighted_sums(tensors, weights) for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_of_zero_does_not_hide_what_is_not_finite(emulated, bad):
    t, weights = torch.ones(3, 4), torch.tensor([1.0, 0.0, 1.0])
    t[1, 2] = bad
    assert emulated.scale_examples([t], weights)[0].isnan().nonzero().tolist() == [[1, 2]]
    assert emulated.weighted_sums([t], weights)[0].isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("op", ["scale_examples", "weighted_sums"])
@pytest.mark.parametrize(("arguments", "message"), BAD_LISTS)
def test_bad_lists_are_refused(emulated, op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(emulated, op)(*arguments)


# -- weighted_gemm -------------------------------------------------------------------------------------------------


@contextmanager
def tf32(allowed):
    """Whether float32 products may be rounded to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = allowed
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def rounded(t, to_tf32):
    """The operand as the products see it, in float64: TF32 rounds to nearest, ties away from zero."""
    if not to_tf32:
        return t.double()
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


def check_gemm(kernels, a, b, weights, to_tf32=False):
    """The oracle scales and rounds the backprops as the kernel does."""
    with tf32(to_tf32):
        got = kernels.weighted_gemm(a, b, weights)
    (scaled,) = reference.scale_examples([b], weights.to(sum_type(b.dtype)))
    a, b = rounded(a, to_tf32), rounded(scaled, to_tf32)
    ones = torch.ones(len(b), dtype=torch.float64)
    magnitudes = reference.scaled_accumulate(a.abs(), b.abs(), ones)
    assert_sums_close(got, reference.scaled_accumulate(a, b, ones), magnitudes, scaled.dtype)


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([1, 3]),
    T=st.sampled_from([1, 5, 33, 50]),
    p=st.sampled_from([1, 7, 16, 64, 130]),
    d=st.sampled_from([1, 9, 32, 72, 136]),
    dtype=dtypes,
    layout=st.tuples(layouts, layouts),
    to_tf32=st.booleans(),
)
def test_weighted_gemm_is_its_twin(kernels, n, T, p, d, dtype, layout, to_tf32):
    a, b = operand((n, T, p), dtype, layout[0]), operand((n, T, d), dtype, layout[1])
    check_gemm(kernels, a, b, torch.rand(n), to_tf32 and dtype == torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_gemm_of_many_rows_is_split(kernels, dtype):
    a, b = operand((7, 100, 12), dtype), operand((7, 100, 16), dtype)
    check_gemm(kernels, a, b, torch.rand(7))


def test_weighted_gemm_reads_slices_of_wider_rows(kernels):
    a, b = torch.randn(3, 10, 40)[:, :, 8:24], torch.randn(3, 1, 40)[:, :, 4:12].expand(3, 10, 8)
    check_gemm(kernels, a, b, torch.rand(3))
    check_gemm(kernels, torch.randn(5, 48)[:, None, 16:32], torch.randn(5, 48)[:, None, 1:9], torch.rand(5))


@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_weighted_gemm_of_nothing_is_zero(kernels, size):
    n, T, p, d = size
    got = kernels.weighted_gemm(torch.randn(n, T, p), torch.randn(n, T, d), torch.rand(n))
    assert got.shape == (d, p)
    assert not got.any()


def test_weighted_gemm_refuses_what_does_not_fit(kernels):
    a, b = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)
    with pytest.raises(RuntimeError, match="same n and T"):
        kernels.weighted_gemm(a[:, :2], b, torch.ones(2))
    with pytest.raises(RuntimeError, match="one weight for each of the 2 examples"):
        kernels.weighted_gemm(a, b, torch.ones(3))
    with pytest.raises(RuntimeError, match="one dtype"):
        kernels.weighted_gemm(a.double(), b, torch.ones(2))
