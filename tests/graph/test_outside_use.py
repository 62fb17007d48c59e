"""Parameters that are used outside of layer calls are found, and their part of the norms is exact."""

import pytest
import torch
import torch.nn.functional as F
from engine_checks import TOLERANCE, assert_measured, check
from little_network import Around
from oracle import random_losses, relative, tensor, truth
from torch import nn

import engm

pytestmark = pytest.mark.torch_insides

X = tensor(6, 5)


class Functional(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.layer, self.other, self.how = nn.Linear(5, 5), nn.Linear(5, 5), how

    def forward(self, x):
        return self.how(self, self.layer(x), x)


@pytest.mark.parametrize(
    "how",
    [
        lambda net, h, x: F.linear(h, net.layer.weight),
        lambda net, h, x: h @ net.layer.weight.T,
        lambda net, h, x: h @ net.layer.weight,
        lambda net, h, x: torch.einsum("ni,oi->no", h, net.layer.weight),
        lambda net, h, x: h + F.linear(x, net.other.weight),
        lambda net, h, x: h + net.layer.bias,
        lambda net, h, x: h / (net.layer.bias.abs() + 1) - net.other.bias,
        lambda net, h, x: h + net.other.forward(x),
        lambda net, h, x: h * net.layer.weight.norm(),
        lambda net, h, x: h.abs() ** net.layer.bias.abs(),
        lambda net, h, x: torch.addmm(net.other.bias, h, net.layer.weight, beta=0.5, alpha=2.0),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_parameter_used_outside(how, strict):
    check(Functional(how).double(), lambda m: random_losses(m(X)), strict=strict)


def test_weight_penalty_in_the_losses():
    net = Around().double()
    expected = truth(net, lambda m: random_losses(m(X)) + 0.1 * m.first.weight.square().sum())
    model = engm.GradNormModule(net)
    assert_measured(engm.measure(model, random_losses(model(X)) + 0.1 * net.first.weight.square().sum()), expected)


def test_network_called_directly_in_one_of_two_terms():
    net = Around().double()
    expected = truth(net, lambda m: random_losses(m(X)) + random_losses(m(X + 1)))
    model = engm.GradNormModule(net)
    assert_measured(engm.measure(model, random_losses(model(X)) + random_losses(net(X + 1))), expected)


def test_outside_use_that_comes_later():
    """The same calls in the same order with one more use of a weight are another structure."""
    net = Around().double()
    model = engm.GradNormModule(net)
    engm.measure(model, random_losses(model(X)))
    expected = truth(net, lambda m: random_losses(m(X)) + F.linear(X, m.first.weight).sum(1))
    assert_measured(engm.measure(model, random_losses(model(X)) + F.linear(X, net.first.weight).sum(1)), expected)


def test_one_of_two_parameters_by_chance():
    """The same operators on another parameter are another structure."""

    class Chance(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.gains, self.which = nn.Linear(5, 5), nn.ParameterList(torch.rand(2, 5).unbind()), 0

        def forward(self, x):
            return self.layer(x) * self.gains[self.which]

    net = Chance().double()
    model = engm.GradNormModule(net)
    for net.which in (0, 1, 0):
        assert_measured(engm.measure(model, random_losses(model(X))), truth(net, lambda m: random_losses(m(X))))


@pytest.mark.parametrize("layer", [nn.Linear(5, 5), nn.Unflatten(1, (5, 1))])
def test_gradient_penalty(layer):
    """Differentiating a gradient uses the weights a second time, behind the back of the layers."""
    rest = [nn.Conv1d(5, 5, 1), nn.Flatten()] if isinstance(layer, nn.Unflatten) else []
    net = nn.Sequential(layer, *rest, nn.Tanh(), nn.Linear(5, 2)).double()

    def losses(model):
        x = X.clone().requires_grad_()
        found = random_losses(model(x))
        (gradient,) = torch.autograd.grad(found.sum(), x, create_graph=True)
        return found + gradient.square().sum(1)

    check(net, losses)


def test_frozen_parameter_may_be_used_anywhere():
    net = Functional(lambda net, h, x: F.linear(h, net.other.weight)).double()
    net.other.requires_grad_(False)
    check(net, lambda m: random_losses(m(X)))


def test_parameters_of_someone_else_may_be_used_anywhere():
    outside = nn.Parameter(tensor(5, 3))
    check(nn.Sequential(nn.Linear(5, 5)).double(), lambda m: random_losses(m(X) @ outside))


def test_weights_that_autocast_casts_once_for_two_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))

    model = engm.GradNormModule(Twice())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = random_losses(model(X.float()).float())
    exact = engm.naive_grad_norms(model, losses)
    assert relative(engm.measure(model, losses).norms, exact) <= TOLERANCE["norm, bfloat16"]
