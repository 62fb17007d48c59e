"""The operators beside the norms of matrices, on the GPU, against their float64 twins; and opcheck for all of them."""

import torch
from device_cases import (
    DEVICE,
    LAYOUTS,
    MODES,
    assert_close,
    assert_norms,
    every_mode,
    every_operator,
    gpu,
    operand,
    tf32,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from engm import ops, reference

pytestmark = gpu
EXAMPLES = settings(max_examples=100, deadline=None)
modes = st.sampled_from(MODES)
layouts = st.sampled_from(LAYOUTS)


def weights_for(n, dtype):
    return (torch.rand(n, device=DEVICE) + 0.1).to(torch.float64 if dtype == torch.float64 else torch.float32)


@EXAMPLES
@given(
    size=st.tuples(st.sampled_from([1, 3, 130]), st.sampled_from([1, 5, 16, 64]), st.sampled_from([1, 7, 64, 1030])),
    channel_dim=st.sampled_from([1, 2]),
    mode=modes,
    layout=layouts,
    kept=st.tuples(*[st.tuples(st.booleans(), st.booleans(), st.booleans())] * 2),
    has_mean=st.booleans(),
)
def test_affine_norm_sq_is_its_twin(size, channel_dim, mode, layout, kept, has_mean):
    x, gy = operand(size, mode.dtype, layout), operand(size, mode.dtype, layout)
    shapes = ([s if keep else 1 for s, keep in zip(size, which, strict=True)] for which in kept)
    mean_shape, rstd_shape = shapes
    mean = operand(mean_shape, mode.dtype) if has_mean else None
    rstd = torch.rand(rstd_shape, device=DEVICE).to(mode.dtype) + 0.5
    got = ops.affine_norm_sq(x, gy, mean, rstd, channel_dim)
    exact_mean = None if mean is None else mean.double()
    want = reference.affine_norm_sq(x.double(), gy.double(), exact_mean, rstd.double(), channel_dim)
    normalised = (x.double() - (0 if mean is None else exact_mean)) * rstd.double()
    along = 3 - channel_dim
    terms = torch.stack(  # sums of mixed signs: errors are relative to what was summed
        [((gy.double() * normalised).square()).sum((1, 2)), gy.double().square().sum((1, 2))]
    )
    fp32 = MODES[0] if mode.dtype == torch.float64 else MODES[1]  # no product runs on tensor cores here
    assert_norms(got[0], want[0], fp32, terms * size[along])
    for grads, exact, term in zip(got[1:], want[1:], terms, strict=True):
        error = (grads.double() - exact).norm(dim=1)
        assert bool((error <= fp32.tolerance * (term * size[along]).sqrt() + 1e-300).all())


@EXAMPLES
@given(
    n=st.sampled_from([1, 2, 33]),
    T=st.sampled_from([1, 2, 31, 300]),
    d=st.sampled_from([1, 7, 64, 769]),
    rows=st.sampled_from([1, 3, 1000]),
    padding_idx=st.sampled_from([-1, 0]),
    mode=modes,
    layout=layouts,
)
def test_embedding_norm_sq_is_its_twin(n, T, d, rows, padding_idx, mode, layout):
    indices = torch.randint(0, rows, (n, T), device=DEVICE)
    gy = operand((n, T, d), mode.dtype, layout)
    got = ops.embedding_norm_sq(indices, gy, padding_idx)
    want = reference.embedding_norm_sq(indices, gy.double(), padding_idx)
    assert_norms(got, want, MODES[0] if mode.dtype == torch.float64 else MODES[1], gy.double().square().sum((1, 2)))


@EXAMPLES
@given(
    layers=st.integers(1, 70),
    n=st.sampled_from([1, 2, 33, 1025]),
    alpha=st.sampled_from([1e-3, 1.0, 5.0, float("inf")]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    has_factors=st.booleans(),
)
def test_clip_weights_is_its_twin(layers, n, alpha, dtype, has_factors):
    squares = torch.rand(layers, n, device=DEVICE).to(dtype)
    factors = torch.rand(layers, device=DEVICE) if has_factors else None
    got, want = ops.clip_weights(squares, alpha, factors), reference.clip_weights(squares, alpha, factors)
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left, right)


def test_clip_weights_at_the_edges():
    squares = torch.tensor([[0.0, 4.0, float("nan"), float("inf"), -1.0, 25.0]], device=DEVICE)
    for alpha, last in ((5.0, 1.0), (2.5, 0.5)):
        norms, weights = (t.cpu() for t in ops.clip_weights(squares, alpha))
        torch.testing.assert_close(norms, torch.tensor([0.0, 2, float("nan"), float("inf"), 0, 5]), equal_nan=True)
        expected = torch.tensor([1.0, 1, float("nan"), float("nan"), 1, last])
        torch.testing.assert_close(weights, expected, equal_nan=True)


@EXAMPLES
@given(
    shape=st.tuples(*[st.sampled_from(v) for v in ([1, 2, 40], [1, 3, 65], [1, 8, 33, 130], [1, 4, 70])]),
    mode=modes,
    layout=layouts,
)
def test_weighted_products_are_their_twins(shape, mode, layout):
    n, T, p, d = shape
    a, b = operand((n, T, p), mode.dtype, layout), operand((n, T, d), mode.dtype, layout)
    weights = weights_for(n, mode.dtype)
    calls = {
        "gemm": (lambda: ops.weighted_gemm(a, b, weights), (a, weights)),
        "accumulate": (lambda: ops.scaled_accumulate(a, b, weights.to(mode.dtype)), (a, weights.to(mode.dtype))),
        "bias": (lambda: ops.scaled_accumulate(None, b, weights.to(mode.dtype)), (None, weights.to(mode.dtype))),
    }
    for name, (call, (factor, w)) in calls.items():
        with tf32(mode.tf32):
            got = call()
        exact = None if factor is None else factor.double()
        want = reference.scaled_accumulate(exact, b.double(), w.double())
        size = (w.double().square() * (linear_size(exact, b.double()))).sum().sqrt()
        error = float((got.double() - want).norm())
        assert got.shape == want.shape, name
        assert error <= mode.tolerance * float(torch.maximum(size, want.norm())), name


def linear_size(a, b):
    """``[n]``, squared size of the terms of an example's gradient (of a bias without ``a``)."""
    rows = b.square().sum(2)
    return (rows if a is None else rows * a.square().sum(2)).sum(1)


@every_mode
def test_weighted_products_of_real_layers(mode):
    for n, T, p, d in ((32, 197, 384, 1536), (128, 1, 512, 10), (16, 1024, 64, 64)):
        a, b, weights = operand((n, T, p), mode.dtype), operand((n, T, d), mode.dtype), weights_for(n, mode.dtype)
        with tf32(mode.tf32):
            got = ops.weighted_gemm(a, b, weights)
        assert_close(got, reference.weighted_gemm(a.double(), b.double(), weights.double()), mode.tolerance)


SHAPES = st.lists(
    st.sampled_from([(1,), (5,), (3, 4, 7), (64, 8, 8), (130,), (10, 513), (2, 3, 5, 7)]), min_size=1, max_size=70
)


@EXAMPLES
@given(n=st.sampled_from([1, 3, 33]), shapes=SHAPES, mode=modes, layout=layouts)
def test_scaling_and_summing_lists_of_tensors(n, shapes, mode, layout):
    """More tensors than fit into one launch's argument, of very different sizes, some with examples far apart."""
    tensors, weights = [operand((n, *shape), mode.dtype, layout) for shape in shapes], weights_for(n, mode.dtype)
    exact = [t.double() for t in tensors]
    rounding = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[mode.dtype]
    scaled = ops.scale_examples(tensors, weights)
    assert [t.dtype for t in scaled] == [mode.dtype] * len(tensors)
    assert_close(scaled, reference.scale_examples(exact, weights.double()), rounding)
    sums = ops.weighted_sums(tensors, weights)
    for got, want, t in zip(sums, reference.weighted_sums(exact, weights.double()), exact, strict=True):
        assert got.shape == want.shape
        size = (t.flatten(1) * weights.double()[:, None]).square().sum().sqrt()
        assert float((got.double() - want).norm()) <= rounding * float(size)


def test_opcheck():
    """Schemas, fake tensors and tracing of every operator, with CUDA operands."""
    failed = {}
    for case in every_operator():
        try:
            torch.library.opcheck(case.dispatched, case.arguments)
        except Exception as error:
            failed[case.label] = str(error)
    assert not failed


@every_mode
def test_every_operator_on_odd_shapes(mode):
    failed = {}
    for case in every_operator(mode.dtype):
        with tf32(mode.tf32):
            got = case.run()
        try:
            assert_close(got, case.expected(), max(2 * mode.tolerance, 1e-5 if mode.dtype != torch.float64 else 0))
        except AssertionError as error:
            failed[case.label] = str(error)
    assert not failed
