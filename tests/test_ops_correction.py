"""What a batch norm takes off the gradients of the layer before it, against the twins, on the CPU."""

import pytest
import torch
from correction_problems import BAD_FACTORS, BAD_PATCHES, batch_norms, check_factors, check_patch_mean, patches
from hypothesis import given, settings

from engm import ops

EXAMPLES = settings(max_examples=150, deadline=None)


@EXAMPLES
@given(problem=batch_norms())
def test_correction_factors_is_its_twin(problem):
    check_factors(ops.correction_factors(*problem), *problem)


@EXAMPLES
@given(problem=patches())
def test_patch_mean_is_its_twin(problem):
    check_patch_mean(ops.patch_mean(*problem), *problem)


def test_patch_mean_is_a_weight_gradient():
    x = torch.randn(3, 4, 9, 7, dtype=torch.float64)
    weight = torch.zeros(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    geometry = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
    (want,) = torch.autograd.grad(torch.nn.functional.conv2d(x, weight, **geometry).mean(), weight)
    torch.testing.assert_close(ops.patch_mean(x, [3, 2], *map(list, geometry.values())), want[0])


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 0, 5, 5), (2, 3, 1, 1)])
def test_patch_mean_of_nothing_is_zero(shape):
    got = ops.patch_mean(torch.randn(shape), [3, 3], [1, 1], [0, 0], [1, 1])
    assert got.shape == (shape[1], 3, 3)
    assert not got.any()


@pytest.mark.parametrize(("arguments", "message"), BAD_FACTORS)
def test_bad_factors_are_refused(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ops.correction_factors(*arguments)


@pytest.mark.parametrize(("arguments", "message"), BAD_PATCHES)
def test_bad_patches_are_refused(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ops.patch_mean(*arguments)


@pytest.mark.parametrize("positions", [1, 3, 8, 9])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.float64, 1e-10)])
def test_of_few_positions_when_nearly_all_is_taken_off(positions, dtype, tolerance):
    """Sums of squares and products, which few positions are cheapest by, would leave nothing but rounding."""
    a, b = torch.randn(1, positions, 12, dtype=dtype).expand(4, -1, -1), torch.randn(1, positions, 7, dtype=dtype)
    weights = torch.tensor([0.0, 1.0, 1 + 1e-4, 2.0], dtype=dtype)  # of the last the correction is half
    correction = {
        "shift": torch.zeros(4, 7, dtype=dtype),
        "patch_mean": torch.randn(12, dtype=dtype),
        "scale": torch.ones(4, 7, dtype=dtype),
        "correlation": (b.mT @ a[:1])[0],
    }
    backprops = weights.view(4, 1, 1) * b
    found = ops.linear_norm_sq(a, backprops, **correction)
    wanted = (weights - 1).double().square() * correction["correlation"].double().square().sum()
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=1e-11 if dtype == torch.float32 else 1e-25)
    torch.testing.assert_close(
        ops.linear_norm_sq(a, backprops, "direct", **correction), found, rtol=tolerance, atol=1e-11
    )


def test_opcheck():
    engm, channels, rows = torch.ops.engm, torch.rand(4), torch.rand(3, 4)
    image = torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last)
    for outputs in (
        torch.randn(3, 4, 6),
        image.flatten(2),
        torch.randn(3, 4, 12)[:, :, ::2].bfloat16(),
        rows[..., None],
    ):
        torch.library.opcheck(engm.correction_factors.default, (outputs, channels, channels, channels, rows, rows))
    for x, dims in ((image, 2), (torch.randn(2, 3, 9).double(), 1), (torch.randn(2, 3, 4, 5, 6).half(), 3)):
        torch.library.opcheck(engm.patch_mean.default, (x, [3] * dims, [2] * dims, [1] * dims, [1] * dims))
