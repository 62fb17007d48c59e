"""Every kernel in every precision passes its trials on the device, and a trial leaves no trace."""

import pytest
import torch
from device_cases import DEVICE, cuda_only, gpu

import engm
from engm import ops, reference

pytestmark = gpu


def test_every_kernel_passes():
    report = engm.self_test(DEVICE)
    assert report.ok, str(report)
    assert {trial.kernel for trial in report.trials} >= {
        "gemm_norm",
        "conv_norm",
        "gram_norm",
        "gram_contraction",
        "rank_one",
    }


@cuda_only
def test_trials_draw_from_generators_of_their_own():
    before = torch.cuda.get_rng_state(DEVICE), torch.get_rng_state()
    engm.self_test(DEVICE)
    assert torch.equal(torch.cuda.get_rng_state(DEVICE), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_use_under_autocast(dtype):
    a, b = (torch.randn(3, 9, 5, device=DEVICE, dtype=dtype) for _ in range(2))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got = ops.linear_norm_sq(a, b, "direct")
    torch.testing.assert_close(got, reference.linear_norm_sq(a, b), rtol=1e-3, atol=0)
