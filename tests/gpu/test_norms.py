"""Norm operators on the GPU against their float64 twins: drawn shapes, the layers of real networks, awkward layouts."""

import pytest
import torch
from device_cases import (
    DEVICE,
    LAYOUTS,
    MODES,
    ON_CUDA,
    assert_close,
    assert_norms,
    conv_terms,
    correction_of,
    every_mode,
    gpu,
    linear_terms,
    operand,
    output_size,
    tf32,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engm import ops, reference

pytestmark = gpu
EXAMPLES = settings(max_examples=120, deadline=None)
modes = st.sampled_from(MODES)
layouts = st.sampled_from(LAYOUTS)
forms = st.sampled_from(["auto", "direct", "gram"])


@st.composite
def convolutions(draw):
    dims = draw(st.sampled_from([1, 2, 2, 2, 3]))
    each = lambda values: [draw(st.sampled_from(values)) for _ in range(dims)]  # noqa: E731
    kernel, stride, padding, dilation = each([1, 2, 3, 5]), each([1, 1, 2, 3]), each([0, 1, 2]), each([1, 1, 2])
    size = each([3, 4, 7, 8, 16, 21] if dims < 3 else [3, 4, 5])
    out = output_size(size, kernel, stride, padding, dilation)
    assume(min(out) >= 1)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.sampled_from([1, 2, 3, 8, 17, 33, 64]))
    rows = groups * draw(st.sampled_from([1, 2, 4, 9, 20, 65]))
    n = draw(st.sampled_from([1, 2, 5]))
    return (n, channels, *size), (n, rows, *out), (kernel, stride, padding, dilation, groups)


def check_conv(x, gy, geometry, mode, form="auto", correction=None, *, strict=False):
    """One call against its twin; ``strict`` measures the error against the norm even where its terms cancelled."""
    correction = correction or {}
    with tf32(False, mode.tf32):
        got = ops.conv_norm_sq(x, gy, *geometry, form, **correction)
    exact = {name: t.double() for name, t in correction.items()}
    want = reference.conv_norm_sq(x.double(), gy.double(), *geometry, **exact)
    assert_norms(got, want, mode, 0.0 if strict else conv_terms(x, gy, geometry, correction))


def check_linear(a, b, mode, form="auto", correction=None, *, strict=False):
    correction = correction or {}
    with tf32(mode.tf32, False):
        got = ops.linear_norm_sq(a, b, form, **correction)
    want = reference.linear_norm_sq(a.double(), b.double(), **{name: t.double() for name, t in correction.items()})
    assert_norms(got, want, mode, 0.0 if strict else linear_terms(a, b, correction))


@EXAMPLES
@given(problem=convolutions(), mode=modes, x_layout=layouts, gy_layout=layouts, form=forms, corrected=st.booleans())
def test_conv_norm_sq_is_its_twin(problem, mode, x_layout, gy_layout, form, corrected):
    x_shape, gy_shape, geometry = problem
    x, gy = operand(x_shape, mode.dtype, x_layout), operand(gy_shape, mode.dtype, gy_layout)
    correction = None
    if corrected:
        kernel, groups = geometry[0], geometry[4]
        form = "direct" if form == "gram" and (groups > 1 or not ON_CUDA) else form
        weight = (gy_shape[1], x_shape[1] // groups, *kernel)
        correction = correction_of(*gy_shape[:2], (x_shape[1], *kernel), weight, mode.dtype)
    check_conv(x, gy, geometry, mode, form, correction)


@EXAMPLES
@given(
    shape=st.tuples(
        st.sampled_from([1, 2, 5]),
        st.sampled_from([1, 2, 3, 8, 17, 65, 200]),
        st.sampled_from([1, 3, 8, 16, 33, 130]),
        st.sampled_from([1, 3, 8, 12, 129]),
    ),
    mode=modes,
    a_layout=layouts,
    b_layout=layouts,
    form=forms,
    corrected=st.booleans(),
)
def test_linear_norm_sq_is_its_twin(shape, mode, a_layout, b_layout, form, corrected):
    n, T, p, d = shape
    a, b = operand((n, T, p), mode.dtype, a_layout), operand((n, T, d), mode.dtype, b_layout)
    correction = correction_of(n, d, (p,), (d, p), mode.dtype) if corrected else None
    check_linear(a, b, mode, "direct" if corrected and not ON_CUDA else form, correction)


@every_mode
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("channels", "rows", "side"), [(128, 128, 16), (200, 201, 8), (512, 512, 4), (512, 64, 2)])
def test_corrected_norms_of_small_maps(channels, rows, side, layout, mode):
    """In the form that is chosen: the layer's response to the correction where that is cheaper than an epilogue."""
    if not ON_CUDA:
        channels, rows = channels // 8, rows // 8
    x, gy = operand((24, channels, side, side), mode.dtype, layout), operand((24, rows, side, side), mode.dtype, layout)
    correction = correction_of(24, rows, (channels, 3, 3), (rows, channels, 3, 3), mode.dtype)
    correction["scale"] *= 0.3
    check_conv(x, gy, ([3, 3], [1, 1], [1, 1], [1, 1], 1), mode, "auto", correction)


@every_mode
def test_corrected_norms_over_sequences_whose_channels_come_last(mode):
    """cuDNN answers a line of pixels in the order of its input's memory, which has no name for three dimensions."""
    channels, rows = (512, 256) if ON_CUDA else (32, 16)
    x = operand((24, 64, channels), mode.dtype).transpose(1, 2)
    gy = operand((24, 64, rows), mode.dtype).transpose(1, 2)
    correction = correction_of(24, rows, (channels, 3), (rows, channels, 3), mode.dtype)
    correction["scale"] *= 0.3
    check_conv(x, gy, ([3], [1], [1], [1], 1), mode, "auto", correction)


def check_grads(got, want, mode, terms):
    """Norms, and gradients by their Frobenius error."""
    assert got[1].is_contiguous()
    assert got[1].dtype == got[0].dtype
    assert_norms(got[0], want[0], mode, terms)
    size = torch.maximum(want[0], terms).clamp_min(1e-300).sqrt()
    error = (got[1].double() - want[1]).flatten(1).norm(dim=1) / size
    assert float(error.max()) <= mode.tolerance


@EXAMPLES
@given(problem=convolutions(), mode=modes, x_layout=layouts, gy_layout=layouts)
def test_conv_grads_is_its_twin(problem, mode, x_layout, gy_layout):
    x_shape, gy_shape, geometry = problem
    x, gy = operand(x_shape, mode.dtype, x_layout), operand(gy_shape, mode.dtype, gy_layout)
    with tf32(False, mode.tf32):
        got = ops.conv_grads(x, gy, *geometry)
    want = reference.conv_grads(x.double(), gy.double(), *geometry)
    check_grads(got, want, mode, conv_terms(x, gy, geometry))


@EXAMPLES
@given(
    shape=st.tuples(*[st.sampled_from(v) for v in ([1, 2, 5], [1, 3, 17, 300], [1, 8, 33, 130], [1, 3, 12, 70])]),
    mode=modes,
    layout=layouts,
)
def test_linear_grads_is_its_twin(shape, mode, layout):
    n, T, p, d = shape
    a, b = operand((n, T, p), mode.dtype, layout), operand((n, T, d), mode.dtype, layout)
    with tf32(mode.tf32, False):
        got = ops.linear_grads(a, b)
    check_grads(got, reference.linear_grads(a.double(), b.double()), mode, linear_terms(a, b))


@EXAMPLES
@given(
    n=st.sampled_from([1, 3, 130]),
    T=st.one_of(st.integers(2, 70), st.integers(120, 135), st.integers(190, 260)),
    p=st.sampled_from([1, 3, 8, 17, 64, 130]),
    d=st.sampled_from([1, 2, 8, 31, 96]),
    mode=modes,
    a_layout=layouts,
    b_layout=layouts,
)
def test_gram_of_many_positions_is_its_twin(n, T, p, d, mode, a_layout, b_layout):
    """Products of ATen's in any order of memory, and both blocks of the kernel that contracts them."""
    a, b = operand((n, T, p), mode.dtype, a_layout), operand((n, T, d), mode.dtype, b_layout)
    check_linear(a, b, mode, "gram")


@every_mode
@pytest.mark.parametrize("T", [24, 64, 65, 196, 257])
def test_gram_goes_back_to_direct_for_the_examples_that_cancel(T, mode):
    """Every other example has backprops that nearly sum to zero, and all have large means: strict on each of them.

    Means and halves of the backprops are exact in every precision, so that the operands' rounding cancels nothing.
    """
    a = (torch.randint(-3, 4, (9, T, 24), device=DEVICE) + 100).to(mode.dtype)
    b = torch.randint(-3, 4, (9, T, 40), device=DEVICE).to(mode.dtype)
    b[::2, T // 2 : T // 2 * 2] = -b[::2, : T // 2]
    b[::2, T // 2 * 2 :] = 0
    check_linear(a, b, mode, "gram", strict=True)


@every_mode
def test_a_batch_of_several_stretches_is_its_twin(mode):
    """More examples than the workspace of the Gram matrices holds at once."""
    a, b = operand((150, 520, 9), mode.dtype), operand((150, 520, 6), mode.dtype)
    check_linear(a, b, mode, "gram")


@EXAMPLES
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=3
    ),  # kernel, patches, pixels left over
    channels=st.sampled_from([1, 3, 8, 17]),
    rows=st.sampled_from([1, 4, 33]),
    mode=modes,
    x_layout=layouts,
    gy_layout=layouts,
    form=forms,
)
def test_patches_are_their_twin(sizes, channels, rows, mode, x_layout, gy_layout, form):
    kernel, out, _ = zip(*sizes, strict=True)
    size = [k * t + min(over, k - 1) for k, t, over in sizes]
    geometry = (list(kernel), list(kernel), [0] * len(kernel), [1] * len(kernel), 1)
    x = operand((3, channels, *size), mode.dtype, x_layout)
    gy = operand((3, rows, *out), mode.dtype, gy_layout)
    with tf32(mode.tf32):
        got = ops.conv_norm_sq(x, gy, *geometry, form)
        grads = ops.conv_grads(x, gy, *geometry)
    want = reference.conv_grads(x.double(), gy.double(), *geometry)
    assert_norms(got, want[0], mode, conv_terms(x, gy, geometry))
    check_grads(grads, want, mode, conv_terms(x, gy, geometry))


ONES = [1, 1]
REAL_CONVOLUTIONS = {  # channels, side, out channels, geometry
    "resnet18 stem": (3, 32, 64, ([3, 3], ONES, ONES, ONES, 1)),
    "resnet18 layer1": (64, 32, 64, ([3, 3], ONES, ONES, ONES, 1)),
    "resnet18 layer2 stride": (64, 32, 128, ([3, 3], [2, 2], ONES, ONES, 1)),
    "resnet18 layer2 shortcut": (64, 32, 128, ([1, 1], [2, 2], [0, 0], ONES, 1)),
    "resnet18 layer2": (128, 16, 128, ([3, 3], ONES, ONES, ONES, 1)),
    "resnet18 layer3": (256, 8, 256, ([3, 3], ONES, ONES, ONES, 1)),
    "resnet18 layer4": (512, 4, 512, ([3, 3], ONES, ONES, ONES, 1)),
    "wrn block1": (160, 32, 160, ([3, 3], ONES, ONES, ONES, 1)),
    "wrn block2 stride": (160, 32, 320, ([3, 3], [2, 2], ONES, ONES, 1)),
    "wrn block3": (640, 8, 640, ([3, 3], ONES, ONES, ONES, 1)),
    "vit patches": (3, 224, 384, ([16, 16], [16, 16], [0, 0], ONES, 1)),
    "depthwise": (96, 14, 96, ([3, 3], ONES, ONES, ONES, 96)),
    "grouped, dilated": (64, 28, 128, ([3, 3], ONES, [2, 2], [2, 2], 4)),
}


@every_mode
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("layer", REAL_CONVOLUTIONS)
def test_convolutions_of_real_networks(layer, memory, mode):
    channels, side, rows, geometry = REAL_CONVOLUTIONS[layer]
    n, out = 5, output_size([side, side], *geometry[:4])
    x = operand((n, channels, side, side), mode.dtype, mean=0.5).to(memory_format=memory)
    gy = operand((n, rows, *out), mode.dtype).to(memory_format=memory)
    for form in ("direct", "gram", "auto"):
        if form == "gram" and layer == "vit patches" and not ON_CUDA:
            continue  # which would take ten gigabytes on the CPU, and 'auto' does not choose
        check_conv(x, gy, geometry, mode, form, strict=True)
    with tf32(False, mode.tf32):
        got = ops.conv_grads(x, gy, *geometry)
    want = reference.conv_grads(x.double(), gy.double(), *geometry)
    assert_norms(got[0], want[0], mode)
    assert_close(got[1], want[1], mode.tolerance)
    weight = (rows, channels // geometry[4], *geometry[0])
    check_conv(
        x, gy, geometry, mode, "auto", correction_of(n, rows, (channels, *geometry[0]), weight, mode.dtype), strict=True
    )


REAL_LINEARS = {  # T, p, d
    "resnet18 head": (1, 512, 10),
    "vgg head": (1, 8192, 1024),
    "vit-s qkv": (197, 384, 1152),
    "vit-s mlp": (197, 384, 1536),
    "vit-b mlp": (197, 3072, 768),
    "vit-b head": (1, 768, 1000),
    "tokens": (64, 768, 768),
}


@every_mode
@pytest.mark.parametrize("layer", REAL_LINEARS)
def test_linear_layers_of_real_networks(layer, mode):
    T, p, d = REAL_LINEARS[layer]
    a, b = operand((5, T, p), mode.dtype, mean=0.5), operand((5, T, d), mode.dtype)
    for form in ("direct", "gram", "auto"):
        check_linear(a, b, mode, form, strict=True)
    check_linear(a, b, mode, "auto", correction_of(5, d, (p,), (d, p), mode.dtype), strict=True)
    with tf32(mode.tf32, False):
        got = ops.linear_grads(a, b)
    want = reference.linear_grads(a.double(), b.double())
    assert_norms(got[0], want[0], mode)
    assert_close(got[1], want[1], mode.tolerance)


def test_tf32_is_used_only_where_torch_allows_it():
    """Linear operators follow the matmul switch, convolutions cuDNN's; a wrong one shows as an error above 1e-5."""
    a, b = operand((4, 100, 64), torch.float32), operand((4, 100, 48), torch.float32)
    x, gy = operand((4, 32, 16, 16), torch.float32), operand((4, 32, 16, 16), torch.float32)
    geometry = ([3, 3], ONES, ONES, ONES, 1)
    small, tiling = operand((4, 32, 4, 4), torch.float32), ([4, 4], [4, 4], [0, 0], ONES, 1)
    fp32 = MODES[1]
    for form in ("direct", "gram"):
        with tf32(False, True):
            got = ops.linear_norm_sq(a, b, form)
        assert_norms(got, reference.linear_norm_sq(a.double(), b.double()), fp32)
        with tf32(True, False):
            got = ops.conv_norm_sq(x, gy, *geometry, form)
            patches = ops.conv_norm_sq(x, small, *tiling, form)
        assert_norms(got, reference.conv_norm_sq(x.double(), gy.double(), *geometry), fp32)
        assert_norms(patches, reference.conv_norm_sq(x.double(), small.double(), *tiling), fp32)


@pytest.mark.parametrize(("form", "bias"), [("direct", 1e-4), ("gram", 2e-3)])
def test_tf32_rounding_has_no_bias(form, bias):
    """Truncated operands, which cuBLAS may have, shrink squared norms by 1.4e-3; rounded ones err on both sides."""
    a, b = operand((256, 64, 64), torch.float32), operand((256, 64, 64), torch.float32)
    want = reference.linear_norm_sq(a.double(), b.double())
    with tf32(True):
        got = ops.linear_norm_sq(a, b, form)
    found = float((got.double() / want).mean()) - 1
    assert abs(found) < bias, f"{form}: mean error of a squared norm {found:.1e}"


@pytest.mark.parametrize("form", ["direct", "gram", "auto"])
@pytest.mark.parametrize("mean", [1.0, 100.0, 1000.0])
def test_large_activation_means_do_not_cancel(mean, form):
    a, b = operand((6, 24, 40), torch.float32, mean=mean), operand((6, 24, 16), torch.float32)
    check_linear(a, b, MODES[1], form, strict=True)
    x, gy = operand((6, 16, 8, 8), torch.float32, mean=mean), operand((6, 16, 8, 8), torch.float32)
    check_conv(x, gy, ([3, 3], ONES, ONES, ONES, 1), MODES[1], form, strict=True)


def test_gram_goes_back_to_direct_where_backprops_cancel():
    a = torch.ones(2, 32, 8, device=DEVICE) + 1e-4 * torch.randn(2, 32, 8, device=DEVICE)
    b = 50 + torch.randn(2, 32, 8, device=DEVICE)
    b[0] -= b[0].mean(0)
    want = reference.linear_norm_sq(a.double(), b.double())
    with tf32(False):
        got = ops.linear_norm_sq(a, b, "gram")
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zeros_and_non_finite_values(form, dtype):
    x, gy = operand((4, 4, 5, 5), dtype), operand((4, 6, 5, 5), dtype)
    gy[1] = 0
    gy[2, 3, 2, 2] = float("nan")
    gy[3, 1, 0, 0] = float("inf")
    norms = ops.conv_norm_sq(x, gy, [3, 3], ONES, ONES, ONES, form=form)
    assert norms[0] > 0
    assert norms[1] == 0
    assert norms[2].isnan()
    assert not norms[3].isfinite()
    a, b = operand((3, 6, 5), dtype), operand((3, 6, 7), dtype)
    b[1], b[2, 0, 0] = 0, float("nan")
    norms = ops.linear_norm_sq(a, b, form)
    assert norms[0] > 0
    assert norms[1] == 0
    assert norms[2].isnan()


@pytest.mark.parametrize("form", ["direct", "gram", "auto"])
def test_a_batch_that_fills_the_machine(form):
    """More blocks than fit at once, and examples that differ: one wrong example index shows."""
    size = torch.arange(1, 514, device=DEVICE, dtype=torch.float32)
    x, gy = operand((513, 16, 12, 12), torch.float32), operand((513, 24, 12, 12), torch.float32)
    check_conv(x * size.view(-1, 1, 1, 1), gy, ([3, 3], ONES, ONES, ONES, 1), MODES[1], form, strict=True)
    a, b = operand((513, 33, 20), torch.float32), operand((513, 33, 40), torch.float32)
    check_linear(a, b * size.view(-1, 1, 1), MODES[1], form, strict=True)
