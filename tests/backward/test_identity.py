"""The pass that gradients are compared with autograd's by is the step's own, where that needs no more of the graph."""

import pytest
import torch
from oracle import per_example_gradients, random_losses, relative, tensor, trained
from torch import nn

import engm
from engm.backward import identity
from engm.backward.collect import TermCollector


def plain():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def used_twice():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


def of_other_parameters():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))


def coupled():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def hooked():
    net = plain()
    net[0].weight.register_hook(lambda gradient: gradient)
    return net


@pytest.fixture
def passes(monkeypatch):
    """The passes that collect terms."""
    met, run = [], TermCollector.run

    def counted(self, *args, **kwargs):
        met.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(TermCollector, "run", counted)
    return met


def step(make, check_every, steps=3, **options):
    """Gradients and statistics of the last of some steps, and its losses."""
    torch.manual_seed(0)
    net = make().double()
    model = engm.GradNormModule(net, check_every=check_every, **options)
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.3)
    for seed in range(steps):
        opt.zero_grad()
        losses = random_losses(model(tensor(6, 4, seed=seed)), seed)
        stats = opt.backward(losses)
    return [p.grad.clone() for p in net.parameters()], stats, losses


@pytest.mark.parametrize(
    ("make", "more"), [(plain, 0), (used_twice, 0), (of_other_parameters, 1), (hooked, 0), (coupled, 1)]
)
def test_same_step_with_and_without(make, more, passes):
    wanted, stats, _ = step(make, 10**9)
    passes.clear()
    found, checked, losses = step(make, 1)
    assert len(passes) == 3 * (1 + more)
    assert torch.equal(stats.norms, checked.norms)
    assert all(map(torch.equal, wanted, found))
    with pytest.raises(RuntimeError, match="second time"):  # it has let go of the graph, as other steps do
        losses.sum().backward()


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_norms_alone(loss_scale, passes):
    net = plain().double()
    model = engm.GradNormModule(net, check_every=1)
    for seed in range(3):
        losses = random_losses(model(tensor(6, 4, seed=seed)), seed)
        truth = per_example_gradients(losses, trained(net))
        norms = engm.per_example_grad_norms(model, losses, loss_scale=loss_scale)
        assert relative(norms, truth.norms) < 1e-9
        losses.sum().backward()  # the graph stays usable
    assert len(passes) == 3


def test_parameters_of_several_types():
    net = plain().double()
    net[0].float()

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net[2](self.net[1](self.net[0](x.float()).double()))

    model = engm.GradNormModule(Mixed(), check_every=1)
    losses = random_losses(model(tensor(6, 4)))
    truth = per_example_gradients(losses, trained(net))
    assert relative(engm.per_example_grad_norms(model, losses), truth.norms) < 1e-6


def test_under_the_callers_autocast():
    """The step's own pass is not cast, so the one that stands for it is not either."""
    found = []
    for check_every in (1, 10**9):
        torch.manual_seed(0)
        net = plain()
        model = engm.GradNormModule(net, check_every=check_every)
        opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.3)
        for seed in range(2):
            opt.zero_grad()
            losses = random_losses(model(tensor(6, 4, seed=seed).float()), seed)
            with torch.autocast("cpu", torch.bfloat16):
                stats = opt.backward(losses)
        found.append([stats.norms, *(p.grad.clone() for p in net.parameters())])
    assert all(map(torch.equal, *found))


class NearlyCancelling(nn.Module):
    """A scale in front of a normalisation, whose gradient is rounding alone, and a good deal of it."""

    def __init__(self, size, between=None):
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)
        self.scale = nn.BatchNorm1d(4)
        self.norm = nn.LayerNorm(3, eps=1e-20, bias=False)
        nn.init.constant_(self.scale.weight, size)
        self.between = between

    def forward(self, x):
        x = self.scale(self.layer(x))
        return self.norm(x if self.between is None else self.between.apply(x))


class DrawnAnew(torch.autograd.Function):
    """Its gradient is another one at every pass, by a factor for each channel."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 + 0.01 * torch.randn(gradient.shape[1:], dtype=gradient.dtype))


class Rounded(DrawnAnew):
    """Its gradient is not linear in the one that it is given."""

    @staticmethod
    def backward(ctx, gradient):
        return gradient + 0.01 * gradient.abs()


def norms_of(net, seed, one_pass):
    model = engm.GradNormModule(net, check_every=1)
    losses = random_losses(model(tensor(2, 4, 3, seed=seed).to(net.layer.weight)), seed)
    if one_pass:
        return engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.3).backward(losses).norms
    return engm.per_example_grad_norms(model, losses)


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 3e-5), (torch.float32, 1e-6)])
def test_gradients_that_are_rounding_alone_may_differ(dtype, size, one_pass, monkeypatch):
    refused = 0
    monkeypatch.setattr(identity, "ROUNDING", {torch.float64: 2e-14, torch.float32: 1e-5})
    for seed in range(10):
        torch.manual_seed(seed)
        net = NearlyCancelling(size).to(dtype)
        assert torch.isfinite(norms_of(net, seed, one_pass)).all()
        with monkeypatch.context() as without:
            without.setattr(identity, "TIMES_ROUNDING", 0)
            try:
                norms_of(net, seed, one_pass)
            except RuntimeError as error:
                refused += "'scale." in str(error)
    assert refused > 0  # these are gradients of the kind


@pytest.mark.parametrize("between", [DrawnAnew, Rounded])
def test_functions_that_are_not_linear_do_not_pass_for_rounding(between):
    model = engm.GradNormModule(NearlyCancelling(1e-4, between).double(), check_every=1)
    losses = random_losses(model(tensor(2, 4, 3)))
    with pytest.raises(RuntimeError):
        engm.per_example_grad_norms(model, losses)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1.0, 30.0, 300.0])
def test_a_scale_of_equal_numbers_is_not_refused(dtype, size):
    """Its gradient is 0, or what rounding leaves of them, divided by the root of epsilon; padding may be such rows."""
    for seed in range(5):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1, bias=False)).to(dtype)
        model = engm.GradNormModule(net, check_every=1)
        x = (size * torch.rand(8, 5, 1)).expand(8, 5, 6).to(dtype).contiguous()
        x[:, 0] = torch.randn(8, 6)
        assert engm.per_example_grad_norms(model, model(x).square().mean((1, 2))).isfinite().all()
