"""The CUDA kernels of correction_factors and patch_mean against the twins, run by the emulator."""

import pytest
import torch
from correction_problems import BAD_FACTORS, BAD_PATCHES, batch_norms, check_factors, check_patch_mean, patches
from hypothesis import given, settings

EXAMPLES = settings(max_examples=80, deadline=None)


@EXAMPLES
@given(problem=batch_norms())
def test_correction_factors_is_its_twin(emulated, problem):
    check_factors(emulated.correction_factors(*problem), *problem)


@EXAMPLES
@given(problem=patches())
def test_patch_mean_is_its_twin(emulated, problem):
    check_patch_mean(emulated.patch_mean(*problem), *problem)


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 0, 5, 5), (2, 3, 1, 1)])
def test_patch_mean_of_nothing_is_zero(emulated, shape):
    assert not emulated.patch_mean(torch.randn(shape), [3, 3], [1, 1], [0, 0], [1, 1]).any()


@pytest.mark.parametrize("channels", [1, 31, 64])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (17, 16)])
def test_images_with_fewer_and_more_pixels_than_threads(emulated, channels, size):
    x = torch.randn(7, channels, *size)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        problem = (x.to(memory_format=memory_format), [5, 3], [1, 1], [2, 1], [1, 1])
        check_patch_mean(emulated.patch_mean(*problem), *problem)


def test_results_are_repeatable(emulated):
    x, geometry = torch.randn(9, 5, 8, 8), ([3, 3], [1, 1], [1, 1], [1, 1])
    assert torch.equal(emulated.patch_mean(x, *geometry), emulated.patch_mean(x, *geometry))


@pytest.mark.parametrize(("arguments", "message"), BAD_FACTORS)
def test_bad_factors_are_refused(emulated, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        emulated.correction_factors(*arguments)


@pytest.mark.parametrize(("arguments", "message"), BAD_PATCHES)
def test_bad_patches_are_refused(emulated, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        emulated.patch_mean(*arguments)
