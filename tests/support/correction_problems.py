"""Random problems for correction_factors and patch_mean, and how their results are compared with the twins'."""

import torch
from hypothesis import strategies as st
from norm_problems import convolutions, layouts, operand

from engm import reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(DTYPES)
# Relative error of a normalised output, which is rounded to the outputs' type; sums are float32 or float64.
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 2e-3}
LEAST = {torch.float16: 6e-8}  # the smallest number of the type


@st.composite
def batch_norms(draw):
    """Arguments of correction_factors."""
    n, d = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1, 3, 16, 35]))
    positions = draw(st.sampled_from([0, 1, 2, 63, 64, 300]))
    dtype, layout = draw(dtypes), draw(layouts)
    outputs = operand((n, d, positions), dtype, layout)
    if layout == "channels_last":
        outputs = outputs.transpose(1, 2).contiguous().transpose(1, 2)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    channels = [operand((d,), sums, draw(st.sampled_from(["contiguous", "sliced"]))) for _ in range(3)]
    return outputs, *channels, operand((n, d), sums), operand((n, d), sums, "sliced")


def check_factors(got, outputs, *rest):
    """Every result is the twin's in float64, rounded once or a few times."""
    wants = reference.correction_factors(*(t.double() for t in (outputs, *rest)))
    sums = torch.float64 if outputs.dtype == torch.float64 else torch.float32
    assert [t.dtype for t in got] == [outputs.dtype, sums, sums]
    dense = outputs.is_contiguous() or outputs.transpose(1, 2).is_contiguous()
    assert got[0].stride() == torch.empty_like(outputs if dense else outputs.contiguous()).stride()
    for result, want in zip(got, wants, strict=True):
        if want.numel() == 0:
            assert result.shape == want.shape
        elif want.isfinite().all():  # over no position there is no root
            rounding = ROUNDING[result.dtype]
            atol = rounding * 1e-3 + LEAST.get(result.dtype, 0)
            torch.testing.assert_close(result.double(), want, rtol=rounding, atol=atol)


@st.composite
def patches(draw):
    """Arguments of patch_mean."""
    x_shape, _, kernel, stride, padding, dilation, _ = draw(convolutions())
    return operand(x_shape, draw(dtypes), draw(layouts), mean=1.0), kernel, stride, padding, dilation


def check_patch_mean(got, x, *geometry):
    """The mean is the twin's in float64, up to the rounding of sums."""
    want = reference.patch_mean(x.double(), *geometry)
    assert got.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    tolerance = 1e-13 if x.dtype == torch.float64 else 2e-6
    magnitude = float(x.double().abs().mean()) if x.numel() else 0.0
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * (magnitude + 1e-30))


MEAN = torch.zeros(4)
BAD_FACTORS = [
    ((torch.zeros(3, 4), MEAN, MEAN, MEAN, torch.zeros(3, 4), torch.zeros(3, 4)), r"expected outputs \[n, d, T\]"),
    ((torch.zeros(3, 4, 5), torch.zeros(3), MEAN, MEAN, torch.zeros(3, 4), torch.zeros(3, 4)), "mean must be"),
    ((torch.zeros(3, 4, 5), MEAN, MEAN, torch.zeros(1), torch.zeros(3, 4), torch.zeros(3, 4)), "gain must be"),
    ((torch.zeros(3, 4, 5), MEAN, MEAN, MEAN, torch.zeros(2, 4), torch.zeros(3, 4)), r"shift must be \[n, d\]"),
    ((torch.zeros(3, 4, 5), MEAN, MEAN, MEAN, torch.zeros(3, 4), torch.zeros(3)), r"scale must be \[n, d\]"),
]
BAD_PATCHES = [
    ((torch.zeros(3, 4), [3], [1], [0], [1]), "1 to 3 spatial dimensions"),
    ((torch.zeros(3, 4, 5), [3, 3], [1], [0], [1]), "kernel_size needs one value"),
    ((torch.zeros(3, 4, 5), [3], [0], [0], [1]), "stride must be at least 1"),
    ((torch.zeros(3, 4, 5).long(), [3], [1], [0], [1]), "expected float32, float64"),
]
