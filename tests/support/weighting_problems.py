"""Random problems and checks for the operators that weight, sum or normalise examples, on any device."""

import torch
from hypothesis import strategies as st
from norm_problems import operand

from engm import reference

# Largest error of a sum, relative to the sum of its terms' magnitudes. Half types are rounded before the operator sees
# them, and the oracle is float64 arithmetic on the same numbers.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
DTYPES = list(TOLERANCE)

dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(["contiguous", "channels_last", "transposed", "sliced"])
# An example's own shape in a list of tensors to weight: odd, empty, aligned, longer than a tile of any kernel.
shapes = st.sampled_from([(), (1,), (0,), (3,), (8,), (4, 7), (16, 3, 3), (8, 4, 4), (2, 3, 5, 4), (129,), (130, 40)])


def sum_type(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_sums_close(got, want, magnitudes, dtype, factor=1.0):
    """The sums agree with `want`; `magnitudes` are the sums of the terms' absolute values, both in float64."""
    assert got.dtype == sum_type(dtype)
    assert got.shape == want.shape
    excess = (got.double() - want).abs() - factor * TOLERANCE[dtype] * magnitudes
    assert (excess <= 1e-30).all(), f"error beyond the tolerance by up to {excess.max()}, dtype {dtype}"


@st.composite
def lists_to_weight(draw):
    """Tensors of several dtypes, shapes and layouts, and one weight an example, sometimes 0."""
    n = draw(st.sampled_from([0, 1, 2, 3, 9, 17, 70]))
    tensors = [
        operand((n, *draw(shapes)), draw(dtypes), draw(layouts) if n else "contiguous")
        for _ in range(draw(st.integers(0, 6)))
    ]
    weights = torch.rand(n, dtype=draw(st.sampled_from([torch.float32, torch.float64])))
    return tensors, weights * (torch.rand(n) < 0.8)


def check_scaled(got, tensors, weights):
    """Every element is the product rounded once, so equal to the twin's."""
    assert len(got) == len(tensors)
    for out, t, want in zip(got, tensors, reference.scale_examples(tensors, weights), strict=True):
        torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
        if out.numel() == 0:
            continue
        assert out.data_ptr() != t.data_ptr()
        dense, outermost = torch.empty_like(t).stride() == t.stride(), len(t) == 1 or t.stride(0) == t[0].numel()
        assert out.stride() == t.stride() if dense and outermost else out.is_contiguous()


def check_sums(got, tensors, weights):
    assert len(got) == len(tensors)
    for out, t in zip(got, tensors, strict=True):
        w = weights.to(sum_type(t.dtype)).double()  # the weights that the operator multiplies with
        (want,) = reference.weighted_sums([t.double()], w)
        (magnitudes,) = reference.weighted_sums([t.double().abs()], w.abs())
        assert_sums_close(out, want, magnitudes, t.dtype)
        assert out.is_contiguous()


@st.composite
def embeddings(draw, dtype=dtypes):
    """Indices from a small table, so that most repeat, backprops, and an index to leave out."""
    n, T = draw(st.sampled_from([0, 1, 3])), draw(st.sampled_from([0, 1, 2, 9, 33, 70, 260]))
    d = draw(st.sampled_from([1, 3, 8, 33, 72, 160]))
    rows = draw(st.sampled_from([1, 2, 7, 1000]))
    indices = torch.randint(rows, (n, T), dtype=draw(st.sampled_from([torch.int64, torch.int32])))
    if draw(st.booleans()):
        indices = indices.t().contiguous().t()
    gy = operand((n, T, d), draw(dtype), draw(layouts) if n * T else "contiguous")
    return indices, gy, draw(st.sampled_from([-1, 0, 1]))


def check_embedding(got, indices, gy, padding_idx):
    want = reference.embedding_norm_sq(indices, gy.double(), padding_idx)
    magnitudes = reference.embedding_norm_sq(indices, gy.double().abs(), padding_idx)
    assert_sums_close(got, want, magnitudes, gy.dtype)


# (arguments, part of the message), for every device.
BAD_EMBEDDINGS = [
    ((torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4, 5)), "same n and T"),
    ((torch.zeros(2, 3, 1, dtype=torch.int64), torch.zeros(2, 3, 5)), "expected indices"),
    ((torch.zeros(2, 3), torch.zeros(2, 3, 5)), "int64 or int32"),
    ((torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 5, dtype=torch.int64)), "expected float32"),
]
BAD_LISTS = [
    (([torch.zeros(3, 2)], torch.zeros(2)), "one row for each of the 2 weights"),
    (([torch.zeros(())], torch.zeros(2)), "one row for each of the 2 weights"),
    (([torch.zeros(2, 2)], torch.zeros(2, 1)), "floating-point weights"),
    (([torch.zeros(2, 2)], torch.zeros(2, dtype=torch.int64)), "floating-point weights"),
    (([torch.zeros(2, 2, dtype=torch.int32)], torch.zeros(2)), "expected float32"),
]
