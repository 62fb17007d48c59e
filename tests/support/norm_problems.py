"""Random problems for the norm operators: shapes that nobody chose by hand, in several layouts."""

import torch
from hypothesis import assume
from hypothesis import strategies as st

layouts = st.sampled_from(["contiguous", "channels_last", "transposed", "sliced"])


def operand(shape, dtype, layout="contiguous", mean=0.0):
    """Random numbers of one dtype in one of several memory layouts."""
    t = (torch.randn(shape, dtype=torch.float64) + mean).to(dtype)
    if layout == "channels_last" and t.dim() in (4, 5):
        return t.to(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.stack([t, t], -1).flatten(-2)[..., ::2]
    return t


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))
    each = lambda values: [draw(st.sampled_from(values)) for _ in range(dims)]  # noqa: E731
    kernel, stride, padding, dilation = each([1, 2, 3, 4]), each([1, 1, 2, 3]), each([0, 1, 2]), each([1, 1, 2])
    size = each([3, 4, 7, 8, 9] if dims < 3 else [3, 4, 5])
    spans = [s + 2 * p - d * (k - 1) - 1 for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)]
    assume(min(spans) >= 0)
    out = [span // s + 1 for span, s in zip(spans, stride, strict=True)]
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.sampled_from([1, 2, 3, 8, 9, 17, 24]))
    rows = groups * draw(st.sampled_from([1, 2, 4, 9, 12, 20]))
    n = draw(st.sampled_from([1, 2, 5]))
    return (n, channels, *size), (n, rows, *out), kernel, stride, padding, dilation, groups


def correction_for(x_shape, gy_shape, kernel, groups, dtype):
    """Arguments of a local batch-norm correction; kernel () for a linear layer's ``[n, T, p]``."""
    linear = not kernel
    channels, rows = (x_shape[2], gy_shape[2]) if linear else (x_shape[1], gy_shape[1])
    return {
        "shift": operand((x_shape[0], rows), dtype),
        "patch_mean": operand((channels, *kernel), dtype),
        "scale": operand((x_shape[0], rows), dtype),
        "correlation": operand((rows, channels // groups, *kernel), dtype),
    }
