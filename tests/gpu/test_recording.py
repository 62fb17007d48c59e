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


def network(norm, seed=0):
    torch.manual_seed(seed)
    net = resnet18(width=32, norm=norm).to(DEVICE)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of the last batch, with which an attack meets no saturated losses
    return net


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(N, 3, 32, 32, generator=generator).to(DEVICE), torch.arange(N, device=DEVICE) % 10


def steps_of(net, method, backend, attack_steps, count=5):
    """The gradients of the last of some steps, each on images of its own, that leave the weights alone."""
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
    for number in range(count):
        opt.zero_grad()
        step(*batch(number))
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
    net = network(norm)
    with tf32(allowed):
        got = steps_of(net, method, backend, attack_steps)
        want = steps_of(net, method, None, attack_steps)
    assert all(bool(g.isfinite().all()) for g in got)
    if attack_steps and allowed:
        return  # a rounding to TF32 turns the signs of many pixels' gradients, and so the attack's steps
    largest = max(float(g.norm()) for g in want)
    tolerance = 0.1 if attack_steps or allowed else 1e-3
    for a, b in zip(got, want, strict=True):
        assert float((a - b).norm()) <= tolerance * max(float(b.norm()), 0.1 * largest)


@pytest.mark.parametrize("allowed", [False, True], ids=["fp32", "tf32"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_examples_are_told_apart_whatever_order_kernels_add_up_in(norm, allowed, benchmark_flag):
    """Of small maps cuDNN's gradients differ from run to run; a row is still its example's alone."""
    for seed in range(3):
        net, (x, y) = network(norm, seed), batch(seed)
        with tf32(allowed):
            model = engm.GradNormModule(net, batch_norm="frozen")
            norms = engm.per_example_grad_norms(model, F.cross_entropy(model(x), y, reduction="none"))
        assert bool(norms.isfinite().all())
