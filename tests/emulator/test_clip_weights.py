"""The CUDA kernel of clip_weights against the twin, run by the emulator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weighting_problems import dtypes

from engm import reference

EXAMPLES = settings(max_examples=60, deadline=None)


@EXAMPLES
@given(
    layers=st.integers(0, 70),
    n=st.sampled_from([0, 1, 33, 128, 130]),
    alpha=st.sampled_from([1e-3, 1.0, 5.0, float("inf")]),
    dtype=dtypes,
    has_factors=st.booleans(),
    transposed=st.booleans(),
)
def test_is_its_twin(emulated, layers, n, alpha, dtype, has_factors, transposed):
    squares = torch.rand(layers, n).to(dtype)
    squares = squares.t().contiguous().t() if transposed else squares
    factors = torch.rand(layers) if has_factors else None
    got, want = emulated.clip_weights(squares, alpha, factors), reference.clip_weights(squares, alpha, factors)
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left, right, rtol=2e-7 if left.dtype == torch.float32 else 1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_edges(emulated, dtype):
    squares = torch.tensor([[0.0, 4.0, float("nan"), float("inf"), -1.0, float("-inf"), 25.0]], dtype=dtype)
    norms, weights = emulated.clip_weights(squares, 2.5)
    nan = float("nan")
    torch.testing.assert_close(norms, torch.tensor([0, 2, nan, float("inf"), 0, nan, 5], dtype=dtype), equal_nan=True)
    torch.testing.assert_close(weights, torch.tensor([1, 1, nan, nan, 1, nan, 0.5], dtype=dtype), equal_nan=True)


def test_layers_are_added_in_order_and_in_double(emulated):
    squares = torch.tensor([[1e16], [1.0], [-1e16]], dtype=torch.float64)
    assert emulated.clip_weights(squares, 1.0)[0].item() == 0.0
    assert emulated.clip_weights(squares[[0, 2, 1]], 1.0)[0].item() == 1.0
    assert emulated.clip_weights(torch.tensor([[1e8], [1.0], [-1e8]]), 1.0)[0].item() == 1.0


def test_bad_arguments_are_refused(emulated):
    with pytest.raises(RuntimeError, match="alpha must be positive"):
        emulated.clip_weights(torch.rand(2, 3), 0.0)
    with pytest.raises(RuntimeError, match="one factor for each of the 2 layers"):
        emulated.clip_weights(torch.rand(2, 3), 1.0, torch.rand(3))
