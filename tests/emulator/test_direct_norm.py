"""The direct form's CUDA kernels (linear, convolution, depthwise) against the twins, run by the emulator.

The oracle is float64 arithmetic on the operands as the kernel rounds them, so that a TF32 norm has to be right to the
rounding of its sums, not of its operands.
"""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_problems import convolutions, correction_for, layouts, operand

from engm import reference

# Relative error of a squared norm: rounding of sums and squares.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
EXAMPLES = settings(max_examples=120, deadline=None)
ONES = [1, 1]

precisions = st.sampled_from(
    [
        (torch.float64, False),
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.float16, False),
    ]
)


@contextmanager
def tf32(allowed):
    """Whether float32 products may be rounded to TF32."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def rounded(t, to_tf32):
    """The operand as the kernel's products see it, in float64: TF32 rounds to nearest, ties away from zero."""
    if not to_tf32:
        return t.double()
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


def rounds(operators):
    """Whether these are the kernels, which round; ATen's operators in their place do not, on the CPU."""
    return operators is torch.ops.engm_emulated


def assert_close(got, want, dtype, factor=1.0):
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=factor * TOLERANCE[dtype], atol=1e-30)


def wide(correction):
    return {name: t.double() for name, t in correction.items()}


def is_depthwise(x_shape, kernel, groups):
    return x_shape[1] == groups and any(k > 1 for k in kernel)


@EXAMPLES
@given(problem=convolutions(), precision=precisions, layout=layouts, corrected=st.booleans())
def test_convolutions(emulated, problem, precision, layout, corrected):
    x_shape, gy_shape, kernel, stride, padding, dilation, groups = problem
    dtype, allowed = precision
    x, gy = operand(x_shape, dtype, layout), operand(gy_shape, dtype, layout)
    correction = correction_for(x_shape, gy_shape, kernel, groups, dtype) if corrected else {}
    geometry = (kernel, stride, padding, dilation, groups)
    with tf32(allowed):
        got = emulated.conv_norm_sq(x, gy, *geometry, "direct", **correction)
    products_round = allowed and rounds(emulated) and not is_depthwise(x_shape, kernel, groups)
    want = reference.conv_norm_sq(
        rounded(x, products_round), rounded(gy, products_round), *geometry, **wide(correction)
    )
    assert_close(got, want, dtype, factor=5 if corrected else 1)


@EXAMPLES
@given(
    n=st.sampled_from([1, 3]),
    T=st.sampled_from([1, 2, 7, 16, 33, 70]),
    p=st.sampled_from([1, 5, 16, 40, 130]),
    d=st.sampled_from([1, 6, 8, 24, 140]),
    precision=precisions,
    layout=layouts,
    corrected=st.booleans(),
)
def test_linear_layers(emulated, n, T, p, d, precision, layout, corrected):
    dtype, allowed = precision
    a, b = operand((n, T, p), dtype, layout), operand((n, T, d), dtype, layout)
    correction = correction_for(a.shape, b.shape, (), 1, dtype) if corrected else {}
    with tf32(allowed):
        got = emulated.linear_norm_sq(a, b, "direct", **correction)
    want = reference.linear_norm_sq(*(rounded(t, allowed and rounds(emulated)) for t in (a, b)), **wide(correction))
    assert_close(got, want, dtype, factor=5 if corrected else 1)


@settings(max_examples=60, deadline=None)
@given(problem=convolutions(), precision=precisions, layout=layouts)
def test_gradients_are_written_whole(emulated, problem, precision, layout):
    x_shape, gy_shape, kernel, stride, padding, dilation, groups = problem
    dtype, allowed = precision
    x, gy = operand(x_shape, dtype, layout), operand(gy_shape, dtype, layout)
    geometry = (kernel, stride, padding, dilation, groups)
    with tf32(allowed):
        norm_sq, grads = emulated.conv_grads(x, gy, *geometry)
    products_round = allowed and rounds(emulated) and not is_depthwise(x_shape, kernel, groups)
    want = reference.conv_grads(rounded(x, products_round), rounded(gy, products_round), *geometry)
    assert_close(norm_sq, want[0], dtype)
    largest = float(want[1].abs().max())
    torch.testing.assert_close(grads.double(), want[1], rtol=0, atol=TOLERANCE[dtype] * (largest + 1e-30))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_linear_gradients(emulated, dtype):
    a, b = operand((3, 9, 21), dtype), operand((3, 9, 70), dtype)
    got, want = emulated.linear_grads(a, b), reference.linear_grads(a.double(), b.double())
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "d", "kernel", "stride", "padding", "dilation"),
    [
        ((1, 72, 9, 10), 68, [3, 3], ONES, ONES, ONES),  # ragged beside full tiles
        ((2, 16, 12, 11), 16, [5, 5], ONES, [2, 2], ONES),  # 25 taps: three tap tiles
        ((1, 8, 15, 15), 8, [7, 7], [2, 2], [3, 3], ONES),
        ((1, 3, 32, 32), 24, [8, 8], [8, 8], [0, 0], ONES),  # patches
        ((1, 16, 40, 40), 8, [3, 3], ONES, [12, 12], [12, 12]),  # taps far apart
        ((1, 64, 33, 5), 64, [1, 3], [3, 1], [0, 1], ONES),
        ((1, 8, 7, 9), 72, [1, 1], [2, 2], [1, 1], ONES),  # one tap, but padded
        ((2, 8, 70), 24, [3], [1], [1], [1]),
        ((1, 8, 5, 6, 7), 8, [3, 3, 3], [2, 1, 1], [1, 1, 1], [1, 1, 1]),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("precision", [(torch.float32, True), (torch.float16, False)])
def test_shapes_of_real_layers(kernels, x, d, kernel, stride, padding, dilation, layout, precision):
    dtype, allowed = precision
    spatial = zip(x[2:], kernel, stride, padding, dilation, strict=True)
    out = [(size + 2 * pad - dil * (k - 1) - 1) // step + 1 for size, k, step, pad, dil in spatial]
    x, gy = operand(x, dtype, layout), operand((x[0], d, *out), dtype, layout)
    geometry = (kernel, stride, padding, dilation)
    with tf32(allowed):
        got = kernels.conv_norm_sq(x, gy, *geometry, form="direct")
    assert_close(got, reference.conv_norm_sq(rounded(x, allowed), rounded(gy, allowed), *geometry), dtype)


def test_truncating_to_tf32_would_not_pass(emulated):
    """The tolerances see the difference between rounding and cutting off."""
    a, b = torch.randn(2, 40, 30), torch.randn(2, 40, 20)
    cut = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for t in (a, b)]
    with tf32(True):
        got = emulated.linear_norm_sq(a, b, "direct").double()
    assert ((got - reference.linear_norm_sq(*cut)).abs() / got).min() > 100 * TOLERANCE[torch.float32]


def test_an_unaligned_view_and_an_expanded_one(emulated):
    a, b = torch.randn(2, 9, 33)[..., 1:], torch.randn(1, 9, 24).expand(2, 9, 24)
    assert_close(emulated.linear_norm_sq(a, b, "direct"), reference.linear_norm_sq(a.double(), b.double()), a.dtype)
    x = torch.randn(2 * 8 * 6 * 6 + 1)[1:].view(2, 6, 6, 8).permute(0, 3, 1, 2)
    gy = torch.randn(2, 6, 6, 8).permute(0, 3, 1, 2)
    geometry = ([3, 3], ONES, ONES, ONES)
    want = reference.conv_norm_sq(x.double(), gy.double(), *geometry)
    with tf32(False):
        assert_close(emulated.conv_norm_sq(x, gy, *geometry, form="direct"), want, x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_are_the_same_bits(emulated, dtype, monkeypatch):
    x, gy = operand((3, 20, 9, 9), dtype), operand((3, 70, 9, 9), dtype)
    norms = []
    for seed in ("0", "1", "2"):
        monkeypatch.setenv("ENGM_EMULATOR_SEED", seed)
        norms.append(emulated.conv_norm_sq(x, gy, [3, 3], ONES, ONES, ONES, form="direct"))
    assert all(torch.equal(norm, norms[0]) for norm in norms)


@pytest.mark.parametrize("shared", ["40", "163", "227"])
def test_cards_with_less_and_more_shared_memory(kernels, shared, monkeypatch):
    """The plan changes, the norm does not."""
    monkeypatch.setenv("ENGM_EMULATOR_SHARED_KB", shared)
    x, gy = torch.randn(1, 70, 12, 12), torch.randn(1, 66, 12, 12)
    geometry = ([3, 3], ONES, ONES, ONES)
    want = reference.conv_norm_sq(rounded(x, True), rounded(gy, True), *geometry)
    with tf32(True):
        assert_close(kernels.conv_norm_sq(x, gy, *geometry, form="direct"), want, x.dtype)


def test_taps_a_whole_image_apart(emulated):
    """No rectangle of positions fits with all taps: one position a step, one tap a block."""
    x, gy = torch.randn(1, 2, 1, 9000), torch.randn(1, 2, 1, 10)
    geometry = ([1, 2], [1, 900], [0, 0], [1, 899])
    with tf32(False):
        got = emulated.conv_norm_sq(x, gy, *geometry, form="direct")
    assert_close(got, reference.conv_norm_sq(x.double(), gy.double(), *geometry), x.dtype)


def test_too_little_shared_memory_is_one_clear_error(kernels, monkeypatch):
    monkeypatch.setenv("ENGM_EMULATOR_SHARED_KB", "1")
    x, gy = torch.randn(1, 2, 8, 8), torch.randn(1, 2, 8, 8)
    with pytest.raises(RuntimeError, match=r"conv_norm_sq: one step .* does not fit into the 1024 bytes"):
        kernels.conv_norm_sq(x, gy, [3, 3], ONES, ONES, ONES, form="direct")


def test_non_finite_values_reach_their_own_norm_only(emulated):
    x, gy = torch.randn(4, 9, 5, 5), torch.randn(4, 6, 5, 5)
    gy[1] = 0
    gy[2, 3, 2, 2] = float("nan")
    x[3, 2, 0, 0] = float("inf")
    norms = emulated.conv_norm_sq(x, gy, [3, 3], ONES, ONES, ONES, form="direct")
    assert norms[0].isfinite()
    assert norms[1] == 0
    assert norms[2].isnan()
    assert not norms[3].isfinite()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_operands(emulated, shape):
    b = torch.randn(*shape[:2], 5)
    torch.testing.assert_close(emulated.linear_norm_sq(torch.randn(shape), b), torch.zeros(shape[0]))
    norm_sq, grads = emulated.linear_grads(torch.randn(shape), b)
    assert norm_sq.tolist() == [0] * shape[0]
    assert grads.shape == (shape[0], 5, shape[2])


@pytest.mark.parametrize("form", ["direct", "gram"])
def test_factors_at_both_ends_of_the_range(emulated, form):
    """P or Q alone overflows or vanishes; the norm does not."""
    for a_size, b_size in ((1e19, 1e-19), (1e-21, 1e19)):
        for T in (1, 6):
            a, b = torch.randn(2, T, 9) * a_size, torch.randn(2, T, 7) * b_size
            want = reference.linear_norm_sq(a.double(), b.double())
            torch.testing.assert_close(emulated.linear_norm_sq(a, b, form).double(), want, rtol=1e-5, atol=0)


def test_positions_far_apart(kernels):
    """A view of [T, n, p] whose example spans more than 2^31 elements: over pixels Gram says no, products take it."""
    storage = torch.empty(2**31 + 8, dtype=torch.float16)  # reserved, hardly touched
    a = storage.as_strided((1, 33, 8), (8, 2**26, 1))
    a.copy_(torch.randn(1, 33, 8))
    b = torch.randn(1, 33, 8).half()
    want = reference.linear_norm_sq(a.double(), b.double())
    for form in ("direct", "gram", "auto"):
        torch.testing.assert_close(kernels.linear_norm_sq(a, b, form).double(), want, rtol=1e-5, atol=0)
    x, gy, geometry = a.transpose(1, 2)[..., None], b.transpose(1, 2)[..., None], (ONES, ONES, [0, 0], ONES, 1)
    for form in ("direct", "auto"):
        torch.testing.assert_close(kernels.conv_norm_sq(x, gy, *geometry, form).double(), want, rtol=1e-5, atol=0)
    with pytest.raises(RuntimeError, match=r"conv_norm_sq: form=.gram. cannot take this layer: an example's pixels"):
        kernels.conv_norm_sq(x, gy, *geometry, "gram")


def test_what_the_gram_form_of_linear_layers_does_not_take(kernels):
    """BLAS counts the distance between positions in 32 bits, and the contraction pairs of them; auto goes direct."""
    storage = torch.empty(2**31 + 16, dtype=torch.float16)  # reserved, hardly touched
    far = storage.as_strided((1, 2, 8), (8, 2**31 + 8, 1))
    far.copy_(torch.randn(1, 2, 8))
    with pytest.raises(RuntimeError, match=r"form=.gram. cannot take this layer: its positions lie more than 2.31"):
        kernels.linear_norm_sq(far, far, "gram")
    long = torch.randn(1, 1, 2).expand(1, 2**15 + 1, 2)
    want = reference.linear_norm_sq(long.double(), long.double())
    torch.testing.assert_close(kernels.linear_norm_sq(long, long).double(), want, rtol=1e-4, atol=0)
    with pytest.raises(
        RuntimeError, match=r"linear_norm_sq: form=.gram. cannot take this layer: its examples have 32769"
    ):
        kernels.linear_norm_sq(long, long, "gram")


def test_a_geometry_beyond_32_bits_is_one_clear_error(kernels):
    x, gy = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)
    with pytest.raises(RuntimeError, match="more than the CUDA kernels count to"):
        kernels.conv_norm_sq(x, gy, [1, 1], [2**30] * 2, [2**30] * 2, ONES)
