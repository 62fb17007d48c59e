"""A branch that is closed at first, and then brings shares of several examples that cancel in the sum of the losses."""

import pytest
import torch
from oracle import per_example_gradients, relative, trained
from torch import nn

import engm
from engm.backward import prepare
from engm.backward.collect import powers_of_two
from engm.checks import RefusedError

N = 6

COUPLED = {
    "softmax over the batch": lambda h: h.softmax(0),
    "centred": lambda h: h - h.mean(0, keepdim=True),
    "neighbours": lambda h: h - h.roll(1, 0),
    "pairs": lambda h: h - h.flip(0),
}


class Gated(nn.Module):
    """A layer behind a gate, and another that is always read."""

    def __init__(self, mix, shared=False):
        super().__init__()
        self.mix, self.layer, self.other = mix, nn.Linear(5, 3), nn.Linear(5, 1)
        self.register_buffer("given", torch.randn(3, 5) if shared else None)
        self.double()

    def forward(self, x, gate):
        beside = self.other(x)[:, 0]
        if self.given is None:
            return self.mix(gate * self.layer(x)).sum(1) + beside
        signs = torch.tensor([1.0, -1.0]).repeat(N // 2).to(x)
        return signs * (gate * self.layer(self.given)).sum() + beside


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_examples_are_refused_as_soon_as_the_branch_opens(name):
    torch.manual_seed(0)
    model = engm.GradNormModule(Gated(COUPLED[name]))
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.1), 1.0)
    x = torch.randn(N, 5, dtype=torch.float64)
    for _ in range(2):
        opt.backward(model(x, 0.0))
    with pytest.raises(RefusedError, match="influences the losses of other examples"):
        opt.backward(model(x, 1.0))


def test_losses_of_opposite_signs_share_a_layer():
    torch.manual_seed(0)
    model = engm.GradNormModule(net := Gated(None, shared=True))
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.1), 1.0)
    for gate in (0.0, 0.0, 1.0, 0.0, 1.0):
        x = torch.randn(N, 5, dtype=torch.float64)
        truth = per_example_gradients(net(x, gate), trained(net))
        opt.zero_grad()
        stats = opt.backward(model(x, gate))
        assert relative(stats.norms, truth.norms) < 1e-12
        parameters = list(net.parameters())
        wanted = torch.autograd.grad((net(x, gate) * stats.weights).mean(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, wanted, strict=True):
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found, torch.zeros_like(parameter) if gradient is None else gradient)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_neighbours_have_different_powers(n):
    powers = powers_of_two(torch.zeros(n, dtype=torch.float64))
    assert len(set(powers.tolist())) == n
    assert torch.equal(powers.log2(), powers.log2().round())


class Routed(nn.Module):
    """A gated layer beside one on rows that the batch's own order moves, so that owners are told at every step."""

    def __init__(self, mix, shared):
        super().__init__()
        self.gated, self.rows = Gated(mix, shared), nn.Linear(5, 2)
        self.double()

    def forward(self, x, gate, order):
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return self.gated(x, gate) + torch.tanh(self.rows(x[order]))[back].sum(1)


@pytest.mark.parametrize("shared", [False, True])
def test_where_owners_are_told_in_the_norm_pass(shared, monkeypatch):
    torch.manual_seed(0)
    told, tell = [], prepare.plan_to_be_told
    monkeypatch.setattr(prepare, "plan_to_be_told", lambda *args: told.append(tell(*args)) or told[-1])
    net = Routed(lambda h: h - h.mean(0, keepdim=True), shared)
    model = engm.GradNormModule(net, check_every=1000)
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.1), 1.0)

    def batch(gate):
        return torch.randn(N, 5, dtype=torch.float64), gate, torch.randperm(N)

    for _ in range(40):
        opt.backward(model(*batch(0.0)))
    assert told[-1] is not None
    given = batch(1.0)
    if not shared:
        with pytest.raises(RefusedError, match="influences the losses of other examples"):
            opt.backward(model(*given))
    else:
        truth = per_example_gradients(net(*given), trained(net))
        assert relative(opt.backward(model(*given)).norms, truth.norms) < 1e-12
    assert told[-1] is None


class Normalised(nn.Module):
    """A gated layer behind a batch norm in training mode, whose examples' shares cancel."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.gated = nn.Linear(5, 5), nn.BatchNorm1d(5), Gated(None, shared=True)
        self.double()

    def forward(self, x, gate):
        return self.gated(torch.tanh(self.norm(self.first(x))), gate)


@pytest.mark.parametrize("batch_norm", ["frozen", "calibrated"])
def test_under_batch_norm(batch_norm):
    torch.manual_seed(0)
    net = Normalised()
    model = engm.GradNormModule(net, batch_norm=batch_norm, check_every=1000, calibrate_examples=N)
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.1), 1.0)
    gated = [name for name, _ in net.named_parameters()].index("gated.layer.weight")
    for gate in (0.0, 0.0, 1.0, 0.0, 1.0):
        x = torch.randn(N, 5, dtype=torch.float64)
        truth = per_example_gradients(net(x, gate), trained(net))
        found = engm.measure(model, model(x, gate)).stacked
        assert relative(found[gated], truth.squared_norms["gated.layer.weight"]) < 1e-12
        opt.backward(model(x, gate))
