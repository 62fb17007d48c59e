"""linear_grads and conv_grads against their twins in float64 and against autograd, and their sums against GEMMs."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import per_example_gradients
from test_ops import (
    EXAMPLES,
    TOLERANCE,
    assert_norms_close,
    convolutions,
    dtypes,
    forced,
    isas,
    layouts,
    operand,
)

from engm import ops, reference

pytestmark = pytest.mark.torch_insides

engm = torch.ops.engm


def assert_grads_close(got, want, dtype):
    """Norms and gradients; an entry of mixed signs has an error relative to the largest."""
    assert_norms_close(got[0], want[0], dtype)
    assert got[1].dtype == got[0].dtype
    assert got[1].is_contiguous()
    largest = float(want[1].abs().max()) if want[1].numel() else 0.0
    torch.testing.assert_close(got[1].double(), want[1], rtol=0, atol=TOLERANCE[dtype] * largest + 1e-30)


@EXAMPLES
@given(isa=isas, problem=convolutions(), dtype=dtypes, layout=layouts)
def test_conv_grads_is_its_twin(isa, problem, dtype, layout):
    x_shape, gy_shape, *geometry = problem
    x, gy = operand(x_shape, dtype, layout), operand(gy_shape, dtype, layout)
    with forced(isa):
        got = ops.conv_grads(x, gy, *geometry)
        direct = ops.conv_norm_sq(x, gy, *geometry, form="direct")
    assert_grads_close(got, reference.conv_grads(x.double(), gy.double(), *geometry), dtype)
    assert_norms_close(got[0], direct.double(), dtype)


@EXAMPLES
@given(
    isa=isas,
    shape=st.tuples(
        st.sampled_from([1, 2, 5]),
        st.sampled_from([1, 2, 3, 17, 40, 1100]),
        st.sampled_from([1, 3, 8, 16, 33, 100]),
        st.sampled_from([1, 3, 8, 12, 20]),
    ),
    dtype=dtypes,
    layout=layouts,
)
def test_linear_grads_is_its_twin(isa, shape, dtype, layout):
    n, T, p, d = shape
    a, b = operand((n, T, p), dtype, layout), operand((n, T, d), dtype, layout)
    with forced(isa):
        got = ops.linear_grads(a, b)
    assert_grads_close(got, reference.linear_grads(a.double(), b.double()), dtype)


@pytest.mark.parametrize("kernel", [[1, 1], [3, 2], [5, 5], [7, 7]])  # 25 and 49 taps: more than the lanes of a vector
@pytest.mark.parametrize(("channels", "rows", "groups"), [(8, 12, 1), (40, 12, 4), (8, 16, 8), (20, 5, 1)])
def test_conv_grads_is_autograd(kernel, channels, rows, groups):
    geometry = {"stride": [2, 1], "padding": [1, 3], "dilation": [1, 2]}
    x = torch.randn(3, channels, 9, 11, dtype=torch.float64)
    weight = torch.randn(rows, channels // groups, *kernel, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, weight, groups=groups, **geometry)
    gy = torch.randn_like(y)
    want = per_example_gradients((y * gy).flatten(1).sum(1), {"weight": weight}).gradients["weight"]
    for dtype in (torch.float64, torch.float32):
        got = ops.conv_grads(x.to(dtype), gy.to(dtype), kernel, *geometry.values(), groups)
        assert_grads_close(got, (want.square().sum((1, 2, 3, 4)), want), dtype)


@pytest.mark.parametrize("threads", [1, 2])
def test_items_of_one_gradient_go_to_their_places(threads):
    """Maps too large for one block, one example split over threads: every item owns rows and columns of the result."""
    x, gy = operand((2, 40, 70, 70), torch.float32), operand((2, 33, 70, 70), torch.float32)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1])
    want = reference.conv_grads(x.double(), gy.double(), *geometry)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_grads_close(ops.conv_grads(x, gy, *geometry), want, torch.float32)
        assert_grads_close(ops.conv_grads(x[:1], gy[:1], *geometry), [t[:1] for t in want], torch.float32)
    finally:
        torch.set_num_threads(before)


def test_the_weighted_sum_of_kept_gradients_is_a_matrix_vector_product():
    a, b, weights = torch.randn(5, 30, 7), torch.randn(5, 30, 6), torch.rand(5)
    _, grads = ops.linear_grads(a, b)
    torch.testing.assert_close(grads.flatten(1).t().mv(weights).view(6, 7), ops.scaled_accumulate(a, b, weights))


def test_zeros_and_non_finite_values_stay_in_their_example():
    x, gy = torch.randn(3, 4, 5, 5), torch.randn(3, 6, 5, 5)
    gy[1] = 0
    gy[2, 3, 2, 2] = float("nan")
    norms, grads = ops.conv_grads(x, gy, [3, 3], [1, 1], [1, 1], [1, 1])
    assert norms[0] > 0
    assert norms[1] == 0
    assert norms[2].isnan()
    assert not grads[1].any()
    assert grads[2].flatten(1).isnan().any(1).tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize(("n", "T", "p"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_operands_have_zero_gradients(n, T, p):
    norms, grads = ops.linear_grads(torch.randn(n, T, p), torch.randn(n, T, 5))
    torch.testing.assert_close(norms, torch.zeros(n))
    torch.testing.assert_close(grads, torch.zeros(n, 5, p))


def test_opcheck():
    a, b = torch.randn(3, 4, 5), torch.randn(3, 4, 6)
    x, gy = torch.randn(3, 4, 5, 5), torch.randn(3, 6, 5, 5)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1])
    for op, arguments in [
        (engm.linear_grads, (a, b)),
        (engm.linear_grads, (a.bfloat16(), b.bfloat16())),
        (engm.conv_grads, (x, gy, *geometry)),
        (engm.conv_grads, (x.double(), gy.double(), *geometry, 2)),
        (engm.conv_grads, (x.flatten(2), torch.randn(3, 6, 12), [3], [2], [0], [1])),
    ]:
        torch.library.opcheck(op.default, arguments)


X, GY, ONES = torch.zeros(2, 4, 6, 6), torch.zeros(2, 8, 6, 6), [1, 1]
A, B = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.linear_grads(A, B[:, :2]), "linear_grads: expected activations .* same n and T, got a"),
        (lambda: ops.linear_grads(A, B.double()), "linear_grads: both operands must have one dtype and device"),
        (lambda: ops.linear_grads(A.int(), B.int()), "linear_grads: expected float32"),
        (lambda: ops.conv_grads(X, GY, [3, 3], ONES, [0, 0], ONES), "conv_grads: .* has output size 4"),
        (lambda: ops.conv_grads(X, GY, [3], ONES, ONES, ONES), "conv_grads: kernel_size needs one value"),
        (lambda: ops.conv_grads(X, GY, [3, 3], [0, 1], ONES, ONES), "conv_grads: stride must be at least 1"),
        (lambda: ops.conv_grads(X, GY, [3, 3], ONES, ONES, ONES, 3), "conv_grads: groups must divide"),
        (lambda: ops.conv_grads(X, GY[:1], [3, 3], ONES, ONES, ONES), "conv_grads: .* the same n"),
    ],
)
def test_errors_say_what_came(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
