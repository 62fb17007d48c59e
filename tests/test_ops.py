"""Operators against their twins in float64 and against autograd, over drawn shapes, strides, forms and types."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import forced
from norm_problems import convolutions, correction_for, layouts, operand
from oracle import per_example_gradients

from engm import _C, ops, reference

pytestmark = pytest.mark.torch_insides

# Largest relative error of a norm. Half types are rounded before the operator sees them: their oracle is the same.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
EXAMPLES = settings(max_examples=150, deadline=None)
ISAS = _C.build_info()["cpu_isas"]


def assert_norms_close(got, want, dtype):
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double().sqrt(), want.sqrt(), rtol=TOLERANCE[dtype], atol=1e-30)


dtypes = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16])
isas = st.sampled_from(ISAS)
forms = st.sampled_from(["auto", "direct", "gram"])


@EXAMPLES
@given(isa=isas, problem=convolutions(), dtype=dtypes, layout=layouts, form=forms, corrected=st.booleans())
def test_conv_norm_sq_is_its_twin(isa, problem, dtype, layout, form, corrected):
    x_shape, gy_shape, kernel, stride, padding, dilation, groups = problem
    x, gy = operand(x_shape, dtype, layout), operand(gy_shape, dtype, layout)
    correction = {}
    if corrected:
        form = "direct" if form == "gram" else form
        correction = correction_for(x_shape, gy_shape, kernel, groups, dtype)
    with forced(isa):
        got = ops.conv_norm_sq(x, gy, kernel, stride, padding, dilation, groups, form, **correction)
    wide = {name: t.double() for name, t in correction.items()}
    want = reference.conv_norm_sq(x.double(), gy.double(), kernel, stride, padding, dilation, groups, **wide)
    assert_norms_close(got, want, dtype)


@EXAMPLES
@given(
    isa=isas,
    shape=st.tuples(
        st.sampled_from([1, 2, 5]),
        st.sampled_from([1, 2, 3, 8, 17, 40]),
        st.sampled_from([1, 3, 8, 16, 33, 100]),
        st.sampled_from([1, 3, 8, 12, 20]),
    ),
    dtype=dtypes,
    layout=layouts,
    form=forms,
    corrected=st.booleans(),
)
def test_linear_norm_sq_is_its_twin(isa, shape, dtype, layout, form, corrected):
    n, T, p, d = shape
    a, b = operand((n, T, p), dtype, layout), operand((n, T, d), dtype, layout)
    correction = {}
    if corrected:
        form = "direct" if form == "gram" else form
        correction = correction_for(a.shape, b.shape, (), 1, dtype)
    with forced(isa):
        got = ops.linear_norm_sq(a, b, form, **correction)
    want = reference.linear_norm_sq(a.double(), b.double(), **{name: t.double() for name, t in correction.items()})
    assert_norms_close(got, want, dtype)


@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize("groups", [1, 4])
def test_conv_norm_sq_is_autograd(form, groups):
    x, weight = torch.randn(3, 8, 9, 7, dtype=torch.float64), torch.randn(12, 8 // groups, 3, 2, dtype=torch.float64)
    weight.requires_grad_()
    y = F.conv2d(x, weight, stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=groups)
    gy = torch.randn_like(y)
    want = per_example_gradients((y * gy).flatten(1).sum(1), {"weight": weight}).squared_norms["weight"]
    got = ops.conv_norm_sq(x, gy, [3, 2], [2, 1], [1, 0], [1, 2], groups, form)
    assert_norms_close(got, want, torch.float64)


def test_linear_correction_is_the_exact_backward_of_a_batch_norm():
    """The correction of design 2.5 against autograd through conv and batch norm."""
    x, weight = torch.randn(4, 5, 6, 6, dtype=torch.float64), torch.randn(7, 5, 3, 3, dtype=torch.float64)
    gamma = torch.rand(7, dtype=torch.float64) + 0.5
    weight.requires_grad_()
    y = F.conv2d(x, weight, padding=1)
    z = F.batch_norm(y, None, None, gamma, None, training=True, eps=1e-5)
    gz = torch.randn_like(z)
    want = per_example_gradients((z * gz).flatten(1).sum(1), {"weight": weight}).squared_norms["weight"]
    sigma = (y.detach().var((0, 2, 3), unbiased=False) + 1e-5).sqrt()
    xhat = (y.detach() - y.detach().mean((0, 2, 3))[:, None, None]) / sigma[:, None, None]
    k = gamma / sigma
    patches = F.unfold(x, 3, padding=1).view(4, 5, 3, 3, -1)
    correlation = torch.einsum("not,nckjt->ockj", xhat.flatten(2), patches) / (4 * 36)
    got = ops.conv_norm_sq(
        x, gz * k[:, None, None], [3, 3], [1, 1], [1, 1], [1, 1],
        shift=k * gz.sum((2, 3)), patch_mean=patches.mean((0, 4)), scale=k * (gz * xhat).sum((2, 3)),
        correlation=correlation,
    )  # fmt: skip
    assert_norms_close(got, want, torch.float64)


@pytest.mark.parametrize("mean", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize("form", ["direct", "gram", "auto"])
def test_large_activation_means_do_not_cancel(mean, form):
    a, b = operand((6, 24, 40), torch.float32, mean=mean), operand((6, 24, 16), torch.float32)
    assert_norms_close(ops.linear_norm_sq(a, b, form), reference.linear_norm_sq(a.double(), b.double()), torch.float32)
    x, gy = operand((6, 16, 8, 8), torch.float32, mean=mean), operand((6, 16, 8, 8), torch.float32)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1])
    want = reference.conv_norm_sq(x.double(), gy.double(), *geometry)
    assert_norms_close(ops.conv_norm_sq(x, gy, *geometry, form=form), want, torch.float32)


def test_gram_goes_back_to_direct_where_backprops_cancel():
    """Backprops that sum to almost nothing against constant activations: G is rounding noise beside its terms."""
    a = torch.ones(2, 32, 8) + 1e-4 * torch.randn(2, 32, 8)
    b = 50 + torch.randn(2, 32, 8)
    b[0] -= b[0].mean(0)
    want = reference.linear_norm_sq(a.double(), b.double())
    torch.testing.assert_close(ops.linear_norm_sq(a, b, "gram").double(), want, rtol=1e-3, atol=0)


def test_zeros_and_non_finite_values():
    x, gy = torch.randn(3, 4, 5, 5), torch.randn(3, 6, 5, 5)
    gy[1] = 0
    gy[2, 3, 2, 2] = float("nan")
    for form in ("direct", "gram"):
        norms = ops.conv_norm_sq(x, gy, [3, 3], [1, 1], [1, 1], [1, 1], form=form)
        assert norms[0] > 0
        assert norms[1] == 0
        assert norms[2].isnan()


@pytest.mark.parametrize(("n", "T", "p"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_operands_have_zero_norms(n, T, p):
    torch.testing.assert_close(ops.linear_norm_sq(torch.randn(n, T, p), torch.randn(n, T, 5)), torch.zeros(n))


def test_threads_do_not_change_the_norm_beyond_rounding():
    """One example is split over threads, many are not; large maps go through several blocks."""
    x, gy = operand((2, 40, 70, 70), torch.float32), operand((2, 33, 70, 70), torch.float32)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1])
    want = reference.conv_norm_sq(x.double(), gy.double(), *geometry)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert_norms_close(ops.conv_norm_sq(x, gy, *geometry), want, torch.float32)
            assert_norms_close(ops.conv_norm_sq(x[:1], gy[:1], *geometry), want[:1], torch.float32)
    finally:
        torch.set_num_threads(threads)


@EXAMPLES
@given(
    isa=isas,
    size=st.tuples(st.sampled_from([1, 3]), st.sampled_from([1, 5, 16, 33]), st.sampled_from([1, 7, 64, 1100])),
    channel_dim=st.sampled_from([1, 2]),
    dtype=dtypes,
    layout=layouts,
    kept=st.tuples(*[st.tuples(st.booleans(), st.booleans(), st.booleans())] * 2),
    has_mean=st.booleans(),
)
def test_affine_norm_sq_is_its_twin(isa, size, channel_dim, dtype, layout, kept, has_mean):
    x, gy = operand(size, dtype, layout, mean=3.0), operand(size, dtype, layout)
    mean_shape, rstd_shape = ([s if keep else 1 for s, keep in zip(size, which, strict=True)] for which in kept)
    mean = operand(mean_shape, dtype, mean=3.0) if has_mean else None
    rstd = torch.rand(rstd_shape).to(dtype) + 0.5
    with forced(isa):
        got = ops.affine_norm_sq(x, gy, mean, rstd, channel_dim)
    wide = None if mean is None else mean.double()
    want = reference.affine_norm_sq(x.double(), gy.double(), wide, rstd.double(), channel_dim)
    scale = max(1.0, float(want[0].max()))
    for left, right in zip(got, want, strict=True):
        # Sums of mixed sign: the error is relative to the terms.
        torch.testing.assert_close(left.double(), right, rtol=10 * TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


def test_affine_norm_sq_reads_a_flattened_channels_last_image():
    x, gy = (operand((2, 6, 5, 4), torch.float32, "channels_last").flatten(2) for _ in range(2))
    mean, rstd = torch.randn(1, 6, 1), torch.rand(1, 6, 1)
    got, want = ops.affine_norm_sq(x, gy, mean, rstd, 1), reference.affine_norm_sq(x, gy, mean, rstd, 1)
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left, right)


@EXAMPLES
@given(
    layers=st.integers(1, 70),
    n=st.sampled_from([1, 2, 33]),
    alpha=st.sampled_from([1e-3, 1.0, 5.0, float("inf")]),
    dtype=dtypes,
    has_factors=st.booleans(),
)
def test_clip_weights_is_its_twin(layers, n, alpha, dtype, has_factors):
    squares = torch.rand(layers, n).to(dtype)
    factors = torch.rand(layers) if has_factors else None
    for got, want in zip(
        ops.clip_weights(squares, alpha, factors), reference.clip_weights(squares, alpha, factors), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_clip_weights_at_the_edges():
    squares = torch.tensor([[0.0, 4.0, float("nan"), float("inf"), -1.0, 25.0]])
    for alpha, last in ((5.0, 1.0), (2.5, 0.5)):
        norms, weights = ops.clip_weights(squares, alpha)
        torch.testing.assert_close(norms, torch.tensor([0.0, 2, float("nan"), float("inf"), 0, 5]), equal_nan=True)
        expected = torch.tensor([1.0, 1, float("nan"), float("nan"), 1, last])
        torch.testing.assert_close(weights, expected, equal_nan=True)
    assert ops.clip_weights(squares[:, :2], float("inf"))[1].tolist() == [1, 1]


@EXAMPLES
@given(
    shape=st.tuples(*[st.sampled_from([1, 2, 5, 9])] * 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    layout=layouts,
)
def test_scaled_accumulate_is_its_twin(shape, dtype, layout):
    n, T, p, d = shape
    a, b, weights = operand((n, T, p), dtype, layout), operand((n, T, d), dtype, layout), operand((n,), dtype)
    for factor in (a, None):
        wide = None if factor is None else factor.double()
        want = reference.scaled_accumulate(wide, b.double(), weights.double())
        torch.testing.assert_close(ops.scaled_accumulate(factor, b, weights).double(), want, rtol=1e-4, atol=1e-5)


@EXAMPLES
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    dim=st.sampled_from([1, 2]),
    dtype=dtypes,
    layout=layouts,
)
def test_position_sums_is_its_twin(shape, dim, dtype, layout):
    gradients = operand(shape, dtype, layout)
    norm_sq, sums = ops.position_sums(gradients, dim)
    want = reference.position_sums(gradients.double(), dim)
    assert_norms_close(norm_sq, want[0], dtype)
    torch.testing.assert_close(sums.double(), want[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(8, 16, 192), (8, 1, 1000), (3, 256, 5), (3, 257, 5), (2, 4, 9000)])
def test_few_positions_are_summed_in_loops_and_many_by_aten(isa, shape):
    gradients = torch.randn(shape)[:, :, 1:]
    with forced(isa):
        norm_sq, sums = ops.position_sums(gradients, 1)
    want = reference.position_sums(gradients.double(), 1)
    assert_norms_close(norm_sq, want[0], torch.float32)
    torch.testing.assert_close(sums.double(), want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tracked", [False, True])
def test_all_finite(dtype, tracked):
    largest, nan, inf = torch.finfo(dtype).max, float("nan"), float("inf")
    for values, finite in (
        ([1.0, largest, largest], True),
        ([1.0, nan, 2.0], False),
        ([inf, -inf, 0.0], False),
        ([], True),
    ):
        column = torch.tensor([values, values], dtype=dtype).t().requires_grad_(tracked)
        for losses in (column[:, 0], column[:, 0].clone()):
            assert _C.all_finite(losses) is finite


def test_opcheck():
    a, b = torch.randn(3, 4, 5), torch.randn(3, 4, 6)
    x, gy = torch.randn(3, 4, 5, 5), torch.randn(3, 6, 5, 5)
    engm = torch.ops.engm
    correction = (torch.randn(3, 6), torch.randn(5), torch.randn(3, 6), torch.randn(6, 5))
    for op, arguments in [
        (engm.linear_norm_sq, (a, b)),
        (engm.linear_norm_sq, (a.bfloat16(), b.bfloat16(), "gram")),
        (engm.linear_norm_sq, (a, b, "direct", *correction)),
        (engm.conv_norm_sq, (x, gy, [3, 3], [1, 1], [1, 1], [1, 1])),
        (engm.affine_norm_sq, (a, a + 1, None, torch.rand(3, 1, 1), 2)),
        (engm.affine_norm_sq, (a, a + 1, torch.rand(1, 4, 1), torch.rand(1, 4, 1), 1)),
        (engm.clip_weights, (torch.rand(5, 3), 1.0)),
        (engm.clip_weights, (torch.rand(5, 3).double(), 1.0, torch.rand(5))),
        (engm.position_sums, (a, 1)),
        (engm.position_sums, (a[:, :1], 1)),
        (engm.position_sums, (a[:, :1].bfloat16(), 1)),
        (engm.position_sums, (a.bfloat16(), 2)),
        (engm.scaled_accumulate, (a, b, torch.rand(3))),
        (engm.scaled_accumulate, (None, b, torch.rand(3))),
    ]:
        torch.library.opcheck(op.default, arguments)


def test_bound_operators_are_those_of_the_dispatcher():
    a, b, w = torch.randn(3, 4, 5), torch.randn(3, 4, 6), torch.rand(3)
    x, gy = torch.randn(3, 4, 5, 5), torch.randn(3, 6, 5, 5)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    calls = {
        "linear_norm_sq": (a, b, "auto", None, None, None, None),
        "conv_norm_sq": (x, gy, *geometry, "auto", None, None, None, None),
        "linear_grads": (a, b),
        "conv_grads": (x, gy, *geometry),
        "affine_norm_sq": (a, a + 1, None, torch.rand(3, 1, 1), 2),
        "correction_factors": (a, *torch.rand(3, 4), *torch.rand(2, 3, 4)),
        "patch_mean": (x, *geometry[:4]),
        "embedding_norm_sq": (torch.randint(5, (3, 4)), a, -1),
        "clip_weights": (torch.rand(5, 3), 0.5, torch.rand(5)),
        "scale_examples": ([a, b], w),
        "weighted_sums": ([a, b], w),
        "weighted_gemm": (a, b, w),
        "scaled_accumulate": (None, b, w),
        "position_sums": (b, 1),
        "recurrence": ("RNN_TANH", a, x[0, 0, :4], x[0, 1, :4, :4], None, None, None, [a[:, :, 0]], None, False),
        "recurrence_back": ("RNN_RELU", [a], x[0, 1, :, :], None, [a[:, 0]], a, None, None, None, True),
    }
    assert set(calls) == set(ops.__all__)
    for name, arguments in calls.items():
        bound, dispatched = getattr(_C, name)(*arguments), getattr(torch.ops.engm, name)(*arguments)
        torch.testing.assert_close(bound, dispatched, rtol=0, atol=0)


def test_operators_compile_into_a_graph():
    @torch.compile(backend="aot_eager", fullgraph=True)
    def weights(a, b):
        return ops.clip_weights(ops.linear_norm_sq(a, b)[None], 1.0)[1]

    a, b = torch.randn(3, 4, 5), torch.randn(3, 4, 6)
    torch.testing.assert_close(weights(a, b), reference.clip_weights(reference.linear_norm_sq(a, b)[None], 1.0)[1])


X, GY, ONES = torch.zeros(2, 4, 6, 6), torch.zeros(2, 8, 6, 6), [1, 1]
A, B = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.linear_norm_sq(A, B[:, :2]), "same n and T, got a"),
        (lambda: ops.linear_norm_sq(A, B.double()), "one dtype and device"),
        (lambda: ops.linear_norm_sq(A.int(), B.int()), "expected float32"),
        (lambda: ops.linear_norm_sq(A, B, "fast"), 'got "fast"'),
        (lambda: ops.linear_norm_sq(A, B, shift=torch.zeros(2, 5)), "got 1 of the four"),
        (
            lambda: ops.linear_norm_sq(A, B, "gram", B[:, 0], A[0, 0], B[:, 0], torch.zeros(5, 4)),
            "no batch-norm correction",
        ),
        (lambda: ops.linear_norm_sq(A, B, "auto", B, A[0, 0], B[:, 0], torch.zeros(5, 4)), "shift must have shape"),
        (lambda: ops.conv_norm_sq(X, GY, [3, 3], ONES, [0, 0], ONES), "has output size 4"),
        (lambda: ops.conv_norm_sq(X, GY, [3], ONES, ONES, ONES), "kernel_size needs one value"),
        (lambda: ops.conv_norm_sq(X, GY, [3, 3], [0, 1], ONES, ONES), "stride must be at least 1"),
        (lambda: ops.conv_norm_sq(X, GY, [3, 3], ONES, ONES, ONES, 3), "groups must divide"),
        (lambda: ops.conv_norm_sq(X, GY[:1], [3, 3], ONES, ONES, ONES), "the same n"),
        (lambda: ops.affine_norm_sq(A, A, None, torch.ones(2, 2, 1), 1), "rstd must be 3-d and broadcast"),
        (lambda: ops.affine_norm_sq(A, A, None, torch.ones(1, 1, 1), 0), "channel_dim=0"),
        (lambda: ops.clip_weights(torch.ones(3), 1.0), r"expected squared_norms \[layers, n\]"),
        (lambda: ops.clip_weights(torch.ones(3, 2), 0.0), "alpha must be positive"),
        (lambda: ops.clip_weights(torch.ones(3, 2), float("nan")), "alpha must be positive"),
        (lambda: ops.clip_weights(torch.ones(3, 2), 1.0, torch.ones(2)), "one factor for each of the 3"),
        (lambda: ops.position_sums(A, 0), "dim 1 or 2, got"),
        (lambda: ops.position_sums(A[0], 1), "expected gradients"),
        (lambda: ops.scaled_accumulate(A, B, torch.ones(3)), "one weight for each of the 2"),
        (lambda: ops.scaled_accumulate(A[:1], B, torch.ones(2)), "with the n and T of b"),
    ],
)
def test_errors_say_what_came(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
