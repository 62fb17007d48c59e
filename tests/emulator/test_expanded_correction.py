"""Corrected norms of forms that hold no gradient: from the layer's response to the correction, run by the emulator."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from norm_problems import convolutions, correction_for, layouts, operand

from engm import reference

pytestmark = pytest.mark.usefixtures("exact_float32")
EXAMPLES = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 3e-2}
dtypes = st.sampled_from(list(TOLERANCE))


@pytest.fixture
def exact_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def wide(correction):
    return {name: t.double() for name, t in correction.items()}


def assert_close(got, uncorrected, want, correction, dtype):
    """Squared norms, by the size of the terms that they are the difference of."""
    taken = want.clone()
    for i in range(len(want)):
        shift, mean, scale, correlation = (correction[k].double() for k in correction)
        own = shift[i].view(-1, *[1] * (correlation.dim() - 1)) * mean
        own = own + scale[i].view(-1, *[1] * (correlation.dim() - 1)) * correlation
        taken[i] = own.square().sum()
    assert bool(((got.double() - want).abs() <= TOLERANCE[dtype] * (uncorrected + taken)).all())


@EXAMPLES
@given(problem=convolutions(), dtype=dtypes, layout=layouts)
def test_convolutions(kernels, problem, dtype, layout):
    x_shape, gy_shape, kernel, stride, padding, dilation, groups = problem
    x, gy = operand(x_shape, dtype, layout), operand(gy_shape, dtype, layout)
    correction = correction_for(x_shape, gy_shape, kernel, groups, dtype)
    geometry = (kernel, stride, padding, dilation, groups)
    if groups > 1:
        with pytest.raises(RuntimeError, match="groups=1 only"):
            kernels.conv_norm_sq(x, gy, *geometry, "gram", **correction)
        return
    uncorrected = reference.conv_norm_sq(x.double(), gy.double(), *geometry)
    want = reference.conv_norm_sq(x.double(), gy.double(), *geometry, **wide(correction))
    got = kernels.conv_norm_sq(x, gy, *geometry, "gram", **correction)
    assert_close(got, uncorrected, want, correction, dtype)


@EXAMPLES
@given(
    n=st.sampled_from([1, 3]),
    T=st.sampled_from([1, 2, 7, 33, 70]),
    p=st.sampled_from([1, 5, 16, 130]),
    d=st.sampled_from([1, 7, 8, 24, 600]),
    dtype=dtypes,
    layout=layouts,
)
def test_linear_layers(kernels, n, T, p, d, dtype, layout):
    a, b = operand((n, T, p), dtype, layout), operand((n, T, d), dtype, layout)
    correction = correction_for(a.shape, b.shape, (), 1, dtype)
    want = reference.linear_norm_sq(a.double(), b.double(), **wide(correction))
    got = kernels.linear_norm_sq(a, b, "gram", **correction)
    assert_close(got, reference.linear_norm_sq(a.double(), b.double()), want, correction, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_cancels_is_left_to_the_direct_form(kernels, dtype):
    """The correction of the second example is its gradient but for a thousandth; those beside it are as they were."""
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    x, gy = operand((3, 5, 6, 6), dtype), operand((3, 7, 6, 6), dtype)
    _, gradients = reference.conv_grads(x.double(), gy.double(), *geometry)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    correction = {
        "shift": torch.zeros(3, 7, dtype=kind),
        "patch_mean": torch.zeros(5, 3, 3, dtype=kind),
        "scale": torch.tensor([0.1, 0.999, 0.2], dtype=kind).view(3, 1).repeat(1, 7),
        "correlation": gradients[1].to(kind),
    }
    got = kernels.conv_norm_sq(x, gy, *geometry, "gram", **correction)
    direct = kernels.conv_norm_sq(x, gy, *geometry, "direct", **correction)
    want = reference.conv_norm_sq(x.double(), gy.double(), *geometry, **wide(correction))
    if dtype != torch.float64:
        assert got[1] == direct[1]
    assert float((got.double() / want - 1).abs().max()) < {torch.float64: 1e-6, torch.float32: 0.02}.get(dtype, 0.1)


def test_results_are_repeatable(kernels):
    x, gy = operand((4, 8, 8, 8), torch.float32), operand((4, 9, 8, 8), torch.float32)
    correction = correction_for(x.shape, gy.shape, (3, 3), 1, torch.float32)
    call = (x, gy, [3, 3], [1, 1], [1, 1], [1, 1], 1, "gram")
    assert torch.equal(kernels.conv_norm_sq(*call, **correction), kernels.conv_norm_sq(*call, **correction))


def test_overflow_in_the_response_is_left_to_the_direct_form(kernels):
    x, gy = operand((2, 4, 4, 4), torch.float16), operand((2, 8, 4, 4), torch.float16)
    correction = correction_for(x.shape, gy.shape, (3, 3), 1, torch.float32)
    correction["correlation"] *= 1e5  # beyond the largest number of float16
    call = (x, gy, [3, 3], [1, 1], [1, 1], [1, 1], 1)
    got = kernels.conv_norm_sq(*call, "gram", **correction)
    assert torch.equal(got, kernels.conv_norm_sq(*call, "direct", **correction))
