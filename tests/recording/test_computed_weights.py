"""Recorded steps of networks whose weights are computed, where an answer of the host hangs on the weights' values."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import per_example_gradients, trained
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import engm

pytestmark = pytest.mark.torch_insides
N, WIDTH = 12, 8


class Rounded(torch.autograd.Function):
    """To the nearest of a few numbers; mixes gradients where a weight is larger than one."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return (4 * w).round() / 4

    @staticmethod
    def backward(ctx, gradient):
        (w,) = ctx.saved_tensors
        return gradient + (w.abs().amax() > 1) * gradient.flip(0)


class Computed(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, w):
        return self.step(w)


def computed_by(step):
    def wrap(layer):
        parametrize.register_parametrization(layer, "weight", Computed(step))
        return layer

    return wrap


WRAPS = {
    "rounded": computed_by(lambda w: 2 * Rounded.apply(w / 2)),
    "distribution": computed_by(lambda w: w.softmax(1)),
    "skew": computed_by(lambda w: w.triu() - w.triu().T),
    "layer norm": computed_by(lambda w: F.layer_norm(w, w.shape[1:])),
    "exponential": computed_by(torch.matrix_exp),
    "rotation": parametrizations.orthogonal,
    "Cayley": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
    "spectral norm": parametrizations.spectral_norm,
}


def wrapped(name):
    torch.manual_seed(0)
    return nn.Sequential(WRAPS[name](nn.Linear(WIDTH, WIDTH)), nn.Tanh(), nn.Linear(WIDTH, 3))


def step_of(net):
    model = engm.GradNormModule(net)
    opt = engm.ENGM(model, torch.optim.SGD(net.parameters(), 0.1), 1.0)
    return opt, engm.record(opt, lambda x: model(x).square().sum(1), backend="replay")


@pytest.mark.parametrize("name", WRAPS)
def test_are_the_steps_by_hand(name):
    nets = [wrapped(name)]
    nets.append(copy.deepcopy(nets[0]))
    (opt, recorded), (by_hand, _) = map(step_of, nets)
    for x in torch.randn(6, N, WIDTH):
        opt.zero_grad()
        recorded(x)
        opt.step()
        by_hand.zero_grad()
        by_hand.backward(by_hand.model(x).square().sum(1))
        by_hand.step()
    assert recorded.report().replayed == 4, recorded.report()
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "grown"), [("rounded", 1e3), ("exponential", 5.0)], ids=["a function that begins to mix", "a large matrix"]
)
def test_an_answer_that_becomes_another(name, grown):
    """No norm is of what held when the program was made."""
    net = wrapped(name)
    opt, recorded = step_of(net)
    for k, x in enumerate(torch.randn(6, N, WIDTH)):
        if k == 4:
            assert recorded.report().replayed == 2
            with torch.no_grad():
                net[0].parametrizations.weight.original.mul_(grown)
        opt.zero_grad()
        found = recorded(x).norms
        exact = copy.deepcopy(net).double()
        wanted = per_example_gradients(exact(x.double()).square().sum(1), trained(exact)).norms
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)
    assert recorded.report().replayed == 2
