"""The CUDA kernels of affine_norm_sq against the twin, run by the emulator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_problems import operand
from weighting_problems import DTYPES, TOLERANCE, assert_sums_close, dtypes, layouts

from engm import reference

EXAMPLES = settings(max_examples=150, deadline=None)


def check(emulated, x, gy, mean, rstd, channel_dim):
    """Gradients relative to the magnitudes of their terms, norms to what follows from that."""
    norm_sq, *grads = emulated.affine_norm_sq(x, gy, mean, rstd, channel_dim)
    wide = None if mean is None else mean.double()
    want_norm_sq, *want = reference.affine_norm_sq(x.double(), gy.double(), wide, rstd.double(), channel_dim)
    normalised = (x.double() if mean is None else (x.double() - wide)) * rstd.double()
    for k, terms in enumerate((gy.double() * normalised, gy.double())):
        magnitudes = terms.abs().sum(3 - channel_dim)
        assert_sums_close(grads[k], want[k], magnitudes, x.dtype)
        assert_sums_close(norm_sq[k], want_norm_sq[k], (want[k].abs() * magnitudes).sum(1), x.dtype, factor=3)


@EXAMPLES
@given(
    size=st.tuples(
        st.sampled_from([1, 3]), st.sampled_from([1, 5, 16, 33, 72, 520]), st.sampled_from([1, 2, 7, 49, 64, 530])
    ),
    channel_dim=st.sampled_from([1, 2]),
    dtype=dtypes,
    layout=st.tuples(layouts, layouts),
    kept=st.tuples(*[st.tuples(st.booleans(), st.booleans(), st.booleans())] * 2),
    has_mean=st.booleans(),
)
def test_is_its_twin(emulated, size, channel_dim, dtype, layout, kept, has_mean):
    x, gy = operand(size, dtype, layout[0], mean=3.0), operand(size, dtype, layout[1])
    mean_shape, rstd_shape = ([s if keep else 1 for s, keep in zip(size, which, strict=True)] for which in kept)
    mean = operand(mean_shape, dtype, mean=3.0) if has_mean else None
    check(emulated, x, gy, mean, torch.rand(rstd_shape).to(dtype) + 0.5, channel_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("statistics", ["batch", "group", "layer"])
@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gy_format", [torch.contiguous_format, torch.channels_last])
def test_images_as_the_rules_pass_them(emulated, dtype, statistics, x_format, gy_format):
    """Flattened views of both memory formats, and of one each."""
    x, gy = (torch.randn(2, 24, 4, 6).to(dtype).to(memory_format=f).flatten(2) for f in (x_format, gy_format))
    shape = {"batch": (1, 24, 1), "group": (2, 24, 1), "layer": (2, 1, 24)}[statistics]
    mean, rstd = torch.randn(shape), torch.rand(shape) + 0.5
    mean, rstd = (t.to(torch.promote_types(dtype, torch.float32)) for t in (mean, rstd))
    check(emulated, x, gy, mean, rstd, 1)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("channels", [1000, 1101, 2056])
def test_layer_norm_of_few_positions(emulated, T, channels):
    x, gy = torch.randn(2, T, channels), torch.randn(2, T, channels)
    check(emulated, x, gy, torch.randn(2, T, 1), torch.rand(2, T, 1), 2)
    check(emulated, x, gy, torch.randn(2, 1, channels), torch.rand(2, 1, channels), 2)


@pytest.mark.parametrize("channel_dim", [1, 2])
def test_examples_are_cut_into_parts_where_they_are_few(emulated, channel_dim):
    for n, positions, channels in ((1, 517, 8), (1, 5, 515), (5, 100, 83)):
        size = (n, positions, channels) if channel_dim == 2 else (n, channels, positions)
        statistics = [s if k == channel_dim else 1 for k, s in enumerate(size)]
        x, gy, mean, rstd = torch.randn(size), torch.randn(size), torch.randn(statistics), torch.rand(statistics)
        check(emulated, x, gy, mean, rstd, channel_dim)


def test_examples_are_whole_where_they_are_many(emulated):
    for size in ((64, 3, 4), (66, 5, 7), (64, 17, 160)):
        x, gy, mean, rstd = torch.randn(size), torch.randn(size), torch.randn(1, size[1], 1), torch.rand(1, size[1], 1)
        check(emulated, x, gy, mean, rstd, 1)
        check(emulated, *(t.transpose(1, 2).contiguous() for t in (x, gy, mean, rstd)), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channel_dim", [1, 2])
def test_misaligned_and_overlapping_slices(emulated, dtype, channel_dim):
    """Views that start one element in, and gradients expanded from one element."""
    x = torch.randn(3, 9, 17).to(dtype)[:, 1:, 1:]
    gy = torch.randn(1, 1, 1).to(dtype).expand(3, 8, 16)
    check(emulated, x, gy, None, torch.ones(1, 1, 1), channel_dim)
    check(emulated, gy, x, None, torch.ones(1, 1, 1), channel_dim)


@pytest.mark.parametrize("size", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_operands_have_zero_sums(emulated, size):
    x = torch.randn(size)
    for got, want in zip(
        emulated.affine_norm_sq(x, x, None, torch.ones(1, 1, 1), 1),
        reference.affine_norm_sq(x, x, None, torch.ones(1, 1, 1), 1),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_what_is_not_finite_stays_in_its_example(emulated):
    x, gy = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    gy[1, 2, 3] = float("nan")
    norm_sq, _, shift = emulated.affine_norm_sq(x, gy, None, torch.ones(1, 1, 1), 1)
    assert norm_sq.isnan().tolist() == [[False, True, False]] * 2
    assert shift.isnan().nonzero().tolist() == [[1, 2]]


def test_means_do_not_cancel(emulated):
    x, gy = torch.randn(2, 8, 100) + 1000, torch.randn(2, 8, 100)
    check(emulated, x, gy, x.mean((0, 2), keepdim=True), torch.ones(1, 1, 1), 1)
    assert TOLERANCE[x.dtype] < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), None, torch.ones(1, 1, 1), 1), "one shape"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), None, torch.ones(1, 1, 1), 0), "channel_dim=0"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), None, torch.ones(3), 1), "rstd must be 3-d"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.ones(1, 4, 1), torch.ones(1, 1, 1), 1), "mean must be 3-d"),
        ((torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).double(), None, torch.ones(1, 1, 1), 1), "one dtype"),
    ],
)
def test_bad_arguments_are_refused(kernels, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        kernels.affine_norm_sq(*arguments)
