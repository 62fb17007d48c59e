"""Recorded steps on the GPU, where kernels add up in changing orders and round to TF32."""

import copy

import pytest
import torch
import torch.nn.functional as F
from device_cases import DEVICE, cuda_only, gpu, tf32

import engm
from engm.adversarial import PGD
from engm.recipes.models.resnet import resnet18

pytestmark = [*gpu, cuda_only]
N = 16


@pytest.fixture(params=[False, True], ids=["", "benchmark"])
def benchmark_flag(request):
    torch.backends.cudnn.benchmark = request.param
    yield
    torch.backends.cudnn.benchmark = False


def steps_of(net, x, y, method, backend, attack_steps, count):
    """The gradients of the last of some steps that leave the weights alone."""
    model = engm.GradNormModule(copy.deepcopy(net), calibrate_every=10**9, check_every=10**9)
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    opt = engm.MSGD(model, inner) if method == "msgd" else engm.ENGM(model, inner, alpha=1.0)
    attack = PGD(eps=8 / 255, step_size=2 / 255, steps=attack_steps, random_start=False) if attack_steps else None

    def losses(x, y):
        if attack is None:
            return F.cross_entropy(model(x), y, reduction="none"), None
        found = attack(model, x, y, measure=opt)
        return F.cross_entropy(model(found.inputs), y, reduction="none"), found.measurement

    def by_hand(x, y):
        found, measurement = losses(x, y)
        return opt.backward(found, measurement=measurement)

    step = by_hand if backend is None else engm.record(opt, losses, backend=backend)
    for _ in range(count):
        opt.zero_grad()
        step(x, y)
    if backend is not None:
        report = step.report()
        assert (report.recorded, report.replayed > 0) == (1, True), str(report)
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("backend", ["replay", "cudagraph"])
@pytest.mark.parametrize("attack_steps", [0, 3], ids=["plain", "attacked"])
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("method", ["msgd", "engm"])
@pytest.mark.parametrize("allowed", [False, True], ids=["fp32", "tf32"])
def test_a_step_is_recorded_whatever_order_its_kernels_add_up_in(
    method, norm, attack_steps, backend, allowed, benchmark_flag
):
    torch.manual_seed(0)
    net = resnet18(width=32, norm=norm).to(DEVICE)
    x, y = torch.rand(N, 3, 32, 32, device=DEVICE), torch.arange(N, device=DEVICE) % 10
    with tf32(allowed):
        got = steps_of(net, x, y, method, backend, attack_steps, 5)
        want = steps_of(net, x, y, method, None, attack_steps, 5)
    largest = max(float(g.norm()) for g in want)
    for a, b in zip(got, want, strict=True):
        assert float((a - b).norm()) <= (0.1 if attack_steps or allowed else 1e-3) * max(float(b.norm()), 0.1 * largest)
