"""Precision: norms of numbers of 16, 32 and 64 bits, under autocast and in mixed models.

Two questions. How well is the norm of the numbers that a layer saw (its input and its output's gradient, rounded as
they are) computed? Sums are formed in 32 bits or more, so that error does not depend on the type. And how far is it
from the norm of the same network in float64? That is the rounding of its own arithmetic, far larger in 16 bits.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Truth, per_example_gradients, random_losses, relative, tensor, trained
from torch import nn

import engm


@dataclass(frozen=True)
class Mode:
    """A way to compute, and the relative errors allowed.

    Attributes:
        parameters: their type.
        autocast: the type of autocast, if it is on.
        operands: error of a tensor's norm, as a share of itself or of a thousandth of the whole norm, given what the
            layers saw.
        whole: error of the whole norm against the network in float64.
        update: error of the clipped gradient against that of the network in float64, as a share of the examples'.
    """

    parameters: torch.dtype
    autocast: torch.dtype | None
    operands: float
    whole: float
    update: float

    def context(self):
        return nullcontext() if self.autocast is None else torch.autocast("cpu", dtype=self.autocast)


MODES = {  # documented, with the largest errors seen, in docs/compatibility.md
    "float64": Mode(torch.float64, None, 1e-13, 1e-13, 1e-13),
    "float32": Mode(torch.float32, None, 1e-5, 2e-6, 2e-6),
    "bfloat16": Mode(torch.bfloat16, None, 1e-5, 2e-2, 2e-2),
    "float16": Mode(torch.float16, None, 1e-5, 5e-3, 5e-3),
    "autocast bfloat16": Mode(torch.float32, torch.bfloat16, 1e-5, 2e-2, 2e-2),
    "autocast float16": Mode(torch.float32, torch.float16, 1e-5, 5e-3, 5e-3),
}
NARROW = [torch.bfloat16, torch.float16]
modes = pytest.mark.parametrize("mode", list(MODES))


class Network(nn.Module):
    """Every kind of layer that sums over positions, on ``[n, T, width]``."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.layer, self.rms = nn.Linear(3, width), nn.LayerNorm(width), nn.RMSNorm(width, eps=1e-5)
        self.conv = nn.Conv1d(width, 2 * width, 3, padding=1, groups=width if width % 2 else 1)
        self.group, self.last = nn.GroupNorm(2, 2 * width), nn.Linear(2 * width, 4)

    def forward(self, x):
        x = self.rms(torch.tanh(self.layer(self.first(x))))
        return self.last(F.gelu(self.group(self.conv(x.transpose(1, 2)))).transpose(1, 2)).mean(1)


def loss_of(out, dtype):
    return random_losses(out.to(dtype), seed=1)


def observed(net, run):
    """``run(net)`` and, by module, its input and the gradient of its output as they are in the network's own pass."""
    seen, handles = {}, []

    def watch(module, args, output):
        def note(gradient) -> None:
            seen[module] = (args[0].detach(), gradient.detach())

        output.register_hook(note)

    for module in net.modules():
        if any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_hook(watch))
    result = run(net)
    for handle in handles:
        handle.remove()
    return result, seen


def truth_of_operands(net, seen) -> Truth:
    """Per-example gradients in float64 of the layers one by one, from the numbers that each saw."""
    found = {}
    for name, module in net.named_modules():
        if module not in seen:
            continue
        activations, backprops = seen[module]
        narrow = type(module) in (nn.Linear, nn.Conv1d)  # what autocast rounds for the layer
        activations = (activations.to(backprops.dtype) if narrow else activations).double()
        exact = copy.deepcopy(module).double()
        losses = (exact(activations) * backprops.double()).flatten(1).sum(1)
        gradients = per_example_gradients(losses, trained(exact)).gradients
        found |= {f"{name}.{key}": gradient for key, gradient in gradients.items()}
    return Truth({name: found[name] for name in trained(net)})


def errors(mode: Mode, n: int, length: int, width: int, seed: int) -> dict[str, float]:
    """The errors that a :class:`Mode` bounds."""
    net = Network(width, seed).to(mode.parameters)
    x = (3 * tensor(n, length, 3, seed=seed)).to(mode.parameters)
    losses_in = torch.float64 if mode.parameters == torch.float64 else torch.float32

    def losses(net):
        with mode.context():
            out = net(x)
        return loss_of(out, losses_in)

    (result, seen) = observed(net, lambda net: (model := engm.GradNormModule(net), losses(model)))
    model, computed = result
    measured = engm.measure(model, computed)
    assert measured.stacked.dtype == losses_in
    by_operands = truth_of_operands(net, seen)
    whole = by_operands.norms
    worst = 0.0
    for name, squared in measured.squared_norms.items():
        true = by_operands.squared_norms[name].sqrt()
        worst = max(worst, float(((squared.double().sqrt() - true).abs() / torch.maximum(true, 1e-3 * whole)).max()))
    exact_net = copy.deepcopy(net).double()
    exact = per_example_gradients(loss_of(exact_net(x.double()), torch.float64), trained(exact_net))
    alpha = float(exact.norms.median())
    weights = (alpha / exact.norms).clamp(max=1)
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=alpha)
    opt.backward(computed)
    assert all(parameter.grad.dtype == parameter.dtype for parameter in net.parameters())
    wanted = exact.update(weights)
    difference = torch.stack([(p.grad.double() - wanted[name]).norm() for name, p in net.named_parameters()]).norm()
    return {
        "operands": worst,
        "whole": relative(measured.norms, exact.norms),
        "update": float(difference / (weights * exact.norms).mean()),
    }


@modes
@settings(max_examples=5)
@given(n=st.integers(1, 4), length=st.integers(1, 40), width=st.integers(2, 9), seed=st.integers(0, 99))
def test_norms_of_what_the_layers_saw(mode, n, length, width, seed):
    assert errors(MODES[mode], n, length, width, seed)["operands"] <= MODES[mode].operands


@modes
@settings(max_examples=5)
@given(n=st.integers(1, 4), length=st.integers(4, 40), width=st.integers(4, 12), seed=st.integers(0, 99))
def test_against_float64(mode, n, length, width, seed):
    """A norm over two or three numbers magnifies the rounding of its input without bound; none is that small here."""
    found = errors(MODES[mode], n, length, width, seed)
    assert found["whole"] <= MODES[mode].whole
    assert found["update"] <= MODES[mode].update


# -- sums that narrow types cannot hold ------------------------------------------------------------------------------

LONG = 3001  # positions; sums of ones in bfloat16 end at 256, in float16 at 2048


class Positions(nn.Module):
    """A layer whose losses are the sums of its outputs over all positions, so that every backprop is 1."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).flatten(1).float().sum(1)


def norms_by_name(layer, x, **options):
    model = engm.GradNormModule(Positions(layer))
    with torch.random.fork_rng():
        measured = engm.measure(model, model(x), **options)
    return {name.removeprefix("layer."): squared.sqrt() for name, squared in measured.squared_norms.items()}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("value", [1.0, 0.0078125, 200.0])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding", "layer", "group", "batch"])
def test_many_equal_contributions(kind, value, dtype):
    """Sums of 3001 equal numbers and squares beyond 65504 come out right."""
    n, p, d = 2, 3, 2
    layer = {
        "linear": lambda: nn.Linear(p, d),
        "conv": lambda: nn.Conv1d(p, d, 1),
        "embedding": lambda: nn.Embedding(4, d),
        "layer": lambda: nn.LayerNorm(4),
        "group": lambda: nn.GroupNorm(1, 4),
        "batch": lambda: nn.BatchNorm1d(4).eval(),
    }[kind]().to(dtype)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])  # their mean is 0 and their variance 1
    x = {
        "linear": lambda: torch.full((n, LONG, p), value),
        "conv": lambda: torch.full((n, p, LONG), value),
        "embedding": lambda: torch.full((n, LONG), 1),
        "layer": lambda: (value * signs).expand(n, LONG, 4),
        "group": lambda: (value * signs).view(4, 1).expand(n, 4, LONG),
        "batch": lambda: torch.full((n, 4, LONG), value),
    }[kind]()
    norms = norms_by_name(layer, x.to(dtype) if x.is_floating_point() else x)
    size = torch.tensor(value, dtype=torch.float64)
    scaled = size / (size.square() + 1e-5).sqrt()
    expected = {
        "linear": {"weight": LONG * value * (p * d) ** 0.5, "bias": LONG * d**0.5},
        "conv": {"weight": LONG * value * (p * d) ** 0.5, "bias": LONG * d**0.5},
        "embedding": {"weight": LONG * d**0.5},
        "layer": {"weight": 2 * LONG * float(scaled), "bias": 2 * LONG},
        "group": {"weight": 2 * LONG * float(scaled), "bias": 2 * LONG},
        "batch": {"weight": 2 * LONG * value / (1 + 1e-5) ** 0.5, "bias": 2 * LONG},
    }[kind]
    for name, wanted in expected.items():
        assert norms[name].dtype == torch.float32
        torch.testing.assert_close(norms[name], torch.full((n,), float(wanted)), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("width", [1, 64])
def test_small_terms_beside_large_ones(dtype, width):
    """2000 contributions of 1/16 beside one of 64: each is lost if it is added to the large one in 16 bits."""
    x = torch.full((1, LONG, width), 1 / 16, dtype=dtype)
    x[:, 0] = 64
    norms = norms_by_name(nn.Linear(width, 1, bias=False).to(dtype), x)
    expected = (64 + (LONG - 1) / 16) * width**0.5
    torch.testing.assert_close(norms["weight"], torch.tensor([expected]), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", NARROW)
def test_layers_used_twice(dtype):
    """Gradients of several uses are added before they are rounded."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.LayerNorm(4)

        def forward(self, x):
            return torch.cat([self.scale(part) for part in x.split([LONG - 1, 1], 1)], 1)

    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype)
    norms = norms_by_name(Twice().to(dtype), signs.expand(2, LONG, 4))
    torch.testing.assert_close(norms["scale.bias"], torch.full((2,), 2.0 * LONG), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", NARROW)
def test_norms_of_inputs(dtype):
    x = torch.full((2, LONG, 3), 1.0, dtype=dtype, requires_grad=True)
    layer = nn.Linear(3, 1).to(dtype)
    nn.init.constant_(layer.weight, 300.0)
    model = engm.GradNormModule(Positions(layer))
    found = engm.measure(model, model(x), x).input_norms
    value = float(layer.weight[0, 0])
    torch.testing.assert_close(found, torch.full((2,), value * (3 * LONG) ** 0.5), rtol=2e-6, atol=0)


# -- mixed models ------------------------------------------------------------------------------------------------------


class WideNorms(nn.Module):
    """Layers of 16 bits with normalisations that are kept in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6).to(dtype), nn.Linear(6, 4).to(dtype)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        x = self.first(x)
        return self.last(torch.tanh(self.norm(x.to(self.norm.weight.dtype))).to(x.dtype)).mean(1)


@pytest.mark.parametrize("dtype", NARROW)
def test_wide_norms_in_a_narrow_model(dtype):
    net, x = WideNorms(dtype), tensor(3, 20, 3).to(dtype)
    (result, seen) = observed(net, lambda net: (model := engm.GradNormModule(net), loss_of(model(x), torch.float32)))
    measured = engm.measure(*result)
    expected = truth_of_operands(net, seen)
    for name, squared in measured.squared_norms.items():
        assert relative(squared.sqrt(), expected.squared_norms[name].sqrt()) <= 5e-6
    opt = engm.ENGM(result[0], torch.optim.SGD(net.parameters(), lr=0.1), alpha=1.0)
    opt.backward(result[1])
    assert [p.grad.dtype for p in net.parameters()] == [p.dtype for p in net.parameters()]


# -- gradient scalers --------------------------------------------------------------------------------------------------


def small_problem():
    """Losses so small that without a scale their float16 gradients are 0 or nearly so."""
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    x, y = tensor(5, 6).float(), torch.tensor([0, 1, 2, 0, 1])

    def losses(net):
        with torch.autocast("cpu", dtype=torch.float16):
            return 1e-6 * F.cross_entropy(net(x), y, reduction="none")

    return net, losses, x, y


@pytest.mark.parametrize("way", ["reweight", "backward"])
def test_scaler_in_float16(way):
    """Three steps in float16 with a scaler are three steps in float64 without one."""
    torch.manual_seed(0)
    net, losses, x, y = small_problem()
    plain = copy.deepcopy(net).double()
    exact = per_example_gradients(1e-6 * F.cross_entropy(plain(x.double()), y, reduction="none"), trained(plain))
    alpha = float(exact.norms.median())
    model = engm.GradNormModule(net)
    opt = engm.ENGM(model, torch.optim.SGD(net.parameters(), lr=1e4), alpha=alpha)
    reference = torch.optim.SGD(plain.parameters(), lr=1e4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for _ in range(3):
        exact = per_example_gradients(1e-6 * F.cross_entropy(plain(x.double()), y, reduction="none"), trained(plain))
        weights = (alpha / exact.norms).clamp(max=1)
        for name, gradient in exact.update(weights).items():
            plain.get_parameter(name).grad = gradient
        reference.step()
        opt.zero_grad()
        if way == "reweight":
            scaler.scale(opt.reweight(losses(model), loss_scale=scaler.get_scale()).mean()).backward()
        else:
            opt.backward(losses(model), loss_scale=scaler.get_scale())
            scaler.scale(torch.zeros(()))  # the scaler must have seen a loss before it steps
        assert relative(opt.stats.norms, exact.norms) <= 1e-2
        assert relative(opt.stats.weights, weights) <= 1e-2
        scaler.step(opt)
        scaler.update()
    assert scaler.get_scale() == 2.0**16
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("scale", [2.0**power for power in range(9, 16)])
def test_a_scale_that_overflows_on_the_way_to_a_parameter(scale):
    """No hook is suspected where it is numbers that are too large."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.last = nn.Parameter(torch.randn(6, 6) / 2), nn.Parameter(torch.randn(6, 6) / 2)

        def forward(self, x):
            return (x @ torch.fft.irfft(torch.fft.rfft(self.weight), n=6)).tanh() @ self.last

    for seed in range(5):
        torch.manual_seed(seed)
        model = engm.GradNormModule(Network())
        opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.0), alpha=1.0)
        with torch.autocast("cpu", torch.float16):
            losses = model(torch.randn(4, 5, 6)).float().square().flatten(1).sum(1)
        largest = opt.backward(losses, loss_scale=scale).norms.max()
        assert largest > 0 or largest.isnan()


def test_a_scale_that_overflows_skips_the_step():
    """Weights are NaN, parameters stay, and the scaler halves the scale until it fits."""
    torch.manual_seed(0)
    net, losses, _, _ = small_problem()
    before = copy.deepcopy(net.state_dict())
    model = engm.GradNormModule(net)
    opt = engm.ENGM(model, torch.optim.SGD(net.parameters(), lr=1.0), alpha=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    for step in count():
        opt.zero_grad()
        scaler.scale(opt.reweight(losses(model), loss_scale=scaler.get_scale()).mean()).backward()
        finite = bool(torch.isfinite(opt.stats.weights).all())
        scaler.step(opt)
        scaler.update()
        if finite:
            break
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert step < 30
    assert step > 0
    assert any(not torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_without_a_scale_float16_loses_small_gradients():
    """This is why ``loss_scale`` is there."""
    torch.manual_seed(0)
    net, losses, x, y = small_problem()
    plain = copy.deepcopy(net).double()
    exact = per_example_gradients(1e-6 * F.cross_entropy(plain(x.double()), y, reduction="none"), trained(plain)).norms
    model = engm.GradNormModule(net)
    assert relative(engm.measure(model, losses(model)).norms, exact) > 1e-2
    assert relative(engm.measure(model, losses(model), loss_scale=2.0**16).norms, exact) <= 1e-2


# -- verify ------------------------------------------------------------------------------------------------------------


@modes
def test_verify_knows_the_precision(mode):
    mode = MODES[mode]
    net = Network(6, 0).to(mode.parameters)
    x = tensor(3, 11, 3).to(mode.parameters)

    def losses(model, x):
        with mode.context():
            return loss_of(model(x), torch.float64 if mode.parameters == torch.float64 else torch.float32)

    report = engm.verify(engm.GradNormModule(net), losses, x)
    assert report.passed, report
    narrowest = mode.autocast or mode.parameters
    assert (
        report.tolerance
        == {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}[narrowest]
    )


class Router(nn.Module):
    """Experts are weighed in float32, whatever the network is in, as many routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.gate = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        h = torch.tanh(self.first(x))
        weights = F.linear(h.float(), self.gate.float()).softmax(-1)
        return self.last(h * weights.to(h.dtype)).mean(1)


def test_a_part_in_float32_of_a_network_in_float64():
    torch.manual_seed(0)
    net = Router().double()
    model = engm.GradNormModule(net)  # whose check compares sums of float32
    losses = random_losses(model(tensor(4, 6, 4)))
    found = engm.per_example_grad_norms(model, losses)
    torch.testing.assert_close(found, engm.naive_grad_norms(model, losses), rtol=1e-6, atol=0)
