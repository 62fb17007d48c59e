"""The engine on the GPU: against one float64 backpropagation an example on the CPU, and against itself there."""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from device_cases import DEVICE, cuda_only, gpu, tf32
from torch import nn

import engm
from engm.adversarial import PGD
from engm.recipes.models.resnet import resnet18

pytestmark = gpu
N = 12


def network(norm="group"):
    torch.manual_seed(1)
    return resnet18(width=8, norm=norm).double()


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(N, 3, 16, 16, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(10, (N,), generator=generator)


def losses_of(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def truth(norm="group", net=None, data=None):
    """Norms, and the clipped mean gradient by name at alpha = the median norm: float64, CPU, the paper's definition."""
    net = network(norm) if net is None else net
    x, y = batch() if data is None else data
    losses = losses_of(net, x, y)
    norms = engm.naive_grad_norms(net, losses)
    alpha = float(norms.median())
    (losses * (alpha / norms).clamp(max=1).detach()).mean().backward()
    return norms, alpha, {name: p.grad for name, p in net.named_parameters()}


def on_device(net, dtype=torch.float64, **options):
    x, y = batch(dtype)
    model = engm.GradNormModule(copy.deepcopy(net).to(DEVICE, dtype), **options)
    return model, x.to(DEVICE), y.to(DEVICE)


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def error(got, want):
    return float((got.detach().cpu().double() - want.double()).norm() / want.double().norm())


# Type, TF32, errors of norms and of the update: of a whole network, whose forward and backward passes round
# in that type too (for one operator see test_norms.py).
PRECISIONS = [
    (torch.float64, False, 1e-9, 1e-9),
    (torch.float32, False, 1e-4, 1e-3),
    (torch.float32, True, 5e-2, 2e-1),
    (torch.bfloat16, False, 1e-1, 6e-1),
]


@pytest.mark.parametrize(("dtype", "allow", "tolerance", "of_the_update"), PRECISIONS)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_one_pass_engm_is_the_oracle(dtype, allow, tolerance, of_the_update, memory):
    norms, alpha, gradients = truth()
    model, x, y = on_device(network(), dtype)
    model.to(memory_format=memory)
    opt = engm.ENGM(model, sgd(model), alpha=alpha)
    with tf32(allow):
        stats = opt.backward(losses_of(model, x.to(memory_format=memory), y))
    assert error(stats.norms, norms) <= tolerance
    largest = max(float(g.norm()) for g in gradients.values())
    for name, p in model.unwrap().named_parameters():
        difference = (p.grad.cpu().double() - gradients[name]).norm()
        assert float(difference) <= of_the_update * max(float(gradients[name].norm()), 0.1 * largest), name


def test_per_example_norms_and_measure_and_borrowing():
    norms, alpha, gradients = truth()
    model, x, y = on_device(network())
    x.requires_grad_()
    losses = losses_of(model, x, y)
    assert error(engm.per_example_grad_norms(model, losses), norms) <= 1e-9
    measured = engm.measure(model, losses, inputs=x)
    assert error(measured.norms, norms) <= 1e-9
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    assert error(measured.input_grads, gradient.cpu()) <= 1e-9
    opt = engm.ENGM(model, sgd(model), alpha=alpha)
    opt.backward(losses_of(model, x, y), measurement=measured)
    for name, p in model.unwrap().named_parameters():
        assert error(p.grad, gradients[name]) <= 1e-8, name


def test_exact_batch_norm_is_the_paper():
    norms, alpha, gradients = truth("batch")
    model, x, y = on_device(network("batch"), batch_norm="exact")
    stats = engm.ENGM(model, sgd(model), alpha=alpha).backward(losses_of(model, x, y))
    assert error(stats.norms, norms) <= 1e-8
    for name, p in model.unwrap().named_parameters():
        assert error(p.grad, gradients[name]) <= 1e-6, name


def run(method, device, norm, *, borrowed=False, steps=3):
    """A few training steps; weights of every step and the parameters after it."""
    model = engm.GradNormModule(network(norm).to(device), calibrate_every=2)
    make = {
        "engm": lambda: engm.ENGM(model, sgd(model), alpha=2.0),
        "aengm": lambda: engm.AENGM(model, sgd(model), alpha=2.0, tau=2),
        "nengm": lambda: engm.NENGM(model, sgd(model), alpha=0.05),
        "msgd": lambda: engm.MSGD(model, sgd(model)),
    }
    opt, (x, y) = make[method](), batch()
    x, y, found = x.to(device).requires_grad_(), y.to(device), []
    for _ in range(steps):
        measured = engm.measure(model, losses_of(model, x, y), inputs=x) if borrowed else None
        stats = opt.backward(losses_of(model, x, y), inputs=x, measurement=measured)
        opt.step()
        opt.zero_grad()
        found.append(stats.weights.cpu())
    return found, [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("borrowed", [False, True], ids=["own", "borrowed"])
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("method", ["engm", "aengm", "nengm", "msgd"])
def test_training_is_that_of_the_cpu(method, norm, borrowed):
    """Calibration, regression and the update: the same three steps on either device, in float64."""
    here, there = (
        run(method, DEVICE, norm, borrowed=borrowed),
        run(method, torch.device("cpu"), norm, borrowed=borrowed),
    )
    for got, want in zip(here[0] + here[1], there[0] + there[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_an_attack_on_the_device_hands_its_norms_on(norm):
    model, x, y = on_device(network(norm), torch.float32)
    attack = PGD(eps=8 / 255, step_size=2 / 255, steps=3, eval_mode=False)
    found = attack(model, x, y, generator=torch.Generator().manual_seed(0), measure=True)
    assert float((found.inputs - x).abs().max()) <= 8 / 255 + 1e-6
    opt = engm.ENGM(model, sgd(model), alpha=1.0)
    stats = opt.backward(losses_of(model, found.inputs, y), measurement=found.measurement)
    assert stats.weights.device.type == DEVICE.type
    assert bool(((stats.weights > 0) & (stats.weights <= 1)).all())
    if norm == "group":
        own = engm.per_example_grad_norms(model, losses_of(model, found.inputs, y))
        assert error(stats.norms, own.cpu()) < 0.1  # norms at the attack's last step but one


def test_autocast_and_a_gradient_scaler():
    norms, _, _ = truth()
    model, x, y = on_device(network(), torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        if DEVICE.type == "cpu" and dtype == torch.float16:
            continue
        with torch.autocast(DEVICE.type, dtype):
            losses = losses_of(model, x, y)
        found = engm.per_example_grad_norms(model, losses.float(), loss_scale=256.0)
        assert error(found, norms) < 0.1, dtype


@cuda_only
def test_a_calibrated_model_is_copied():
    """And between two calibrations, which wait for the device, no step does."""
    model, x, y = on_device(network("batch"), torch.float32)
    opt = engm.ENGM(model, sgd(model), alpha=1.0)
    for _ in range(2):
        model.calibration.forget()
        opt.backward(losses_of(model, x, y))
    losses = losses_of(model, x, y)
    with no_synchronisation():
        opt.backward(losses)
    copied = copy.deepcopy(model)
    assert copied.calibration.state_dict()["draws"] == 2
    assert engm.per_example_grad_norms(copied, losses_of(copied, x, y)).isfinite().all()


def bits_of_a_step(norm):
    model, x, y = on_device(network(norm), torch.float32)
    opt = engm.ENGM(model, sgd(model), alpha=1.0)
    stats = opt.backward(losses_of(model, x, y))
    return [stats.norms, stats.weights]


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_norms_of_a_step_repeat_bitwise(norm):
    with deterministic():
        for left, right in zip(bits_of_a_step(norm), bits_of_a_step(norm), strict=True):
            assert torch.equal(left, right)


@contextmanager
def deterministic():
    """cuDNN's own backward passes would differ otherwise."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda_only
@pytest.mark.parametrize("borrowed", [False, True], ids=["own", "borrowed"])
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("method", ["engm", "aengm", "nengm", "msgd"])
def test_backward_does_not_wait_for_the_device(method, norm, borrowed):
    """After the first steps (strict checks, first calibration, first regression) nothing in a step looks at numbers."""
    model, x, y = on_device(network(norm), torch.float32, calibrate_every=10**9)
    x.requires_grad_()
    make = {"engm": engm.ENGM, "nengm": engm.NENGM}
    if method == "msgd":
        opt = engm.MSGD(model, sgd(model))
    elif method == "aengm":
        opt = engm.AENGM(model, sgd(model), alpha=1.0, tau=10**9)
    else:
        opt = make[method](model, sgd(model), alpha=1.0)

    def measured():
        return engm.measure(model, losses_of(model, x, y), inputs=x) if borrowed else None

    for _ in range(3):
        opt.backward(losses_of(model, x, y), inputs=x, measurement=measured())
        opt.step()
        opt.zero_grad()
    torch.cuda.synchronize()
    losses = losses_of(model, x, y)
    with no_synchronisation():
        opt.backward(losses, inputs=x, measurement=measured())
    opt.step()
    torch.cuda.synchronize()


@cuda_only
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_non_finite_losses_give_nan_weights_and_raise_on_request(norm):
    model, x, y = on_device(network(norm), torch.float32)
    opt = engm.ENGM(model, sgd(model), alpha=1.0)
    opt.backward(losses_of(model, x, y))
    opt.zero_grad()
    bad = torch.ones(N, device=DEVICE)
    bad[3] = float("nan")
    stats = opt.backward(losses_of(model, x, y) * bad)
    assert bool(stats.weights[3].isnan())
    if norm == "group":
        assert bool(stats.weights[torch.arange(N) != 3].isfinite().all())
    opt.zero_grad()
    with pytest.raises(ValueError, match="not finite"):
        opt.backward(losses_of(model, x, y) * bad, check=True)
    assert all(p.grad is None for p in model.parameters())


@cuda_only
def test_a_step_on_a_side_stream():
    norms, alpha, _ = truth()
    model, x, y = on_device(network())
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        opt = engm.ENGM(model, sgd(model), alpha=alpha)
        stats = opt.backward(losses_of(model, x, y))
        opt.step()
    side.synchronize()
    assert error(stats.norms, norms) <= 1e-9


class Tokens(nn.Module):
    """Linear layers over positions, layer norm, a head: what a transformer is made of."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(20, 48)
        self.norm = nn.LayerNorm(48)
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        x = x.flatten(2)[..., :20]
        return self.head(F.gelu(self.norm(self.inner(x))).mean(1))


def test_linear_networks():
    torch.manual_seed(3)
    net = Tokens().double()
    x, y = batch()
    norms, alpha, gradients = truth(net=copy.deepcopy(net), data=(x, y))
    model = engm.GradNormModule(net.to(DEVICE))
    stats = engm.ENGM(model, sgd(model), alpha=alpha).backward(losses_of(model, x.to(DEVICE), y.to(DEVICE)))
    assert error(stats.norms, norms) <= 1e-9
    for name, p in model.unwrap().named_parameters():
        assert error(p.grad, gradients[name]) <= 1e-9, name
    report = engm.verify(model, lambda m, data: losses_of(m, *data), (x.to(DEVICE), y.to(DEVICE)))
    assert report.passed, str(report)
