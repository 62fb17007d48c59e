"""Leaves that require a gradient and are no parameters: what perturbs a weight is shared, what is given is not."""

import pytest
import torch
import torch.nn.functional as F
from oracle import per_example_gradients, relative, tensor, trained
from torch import nn

import engm
from engm.checks import RefusedError

pytestmark = pytest.mark.torch_insides
N = 6


class Net(nn.Module):
    """A layer with a weight that is computed, and a layer."""

    def __init__(self, weight):
        super().__init__()
        self.first, self.last, self.weight = nn.Linear(5, 6), nn.Linear(6, 1), weight
        self.double()

    def forward(self, x):
        return self.last(torch.tanh(F.linear(x, self.weight(self, x), self.first.bias)))[:, 0].square()


def leaf(*shape):
    return tensor(*shape).requires_grad_()


def inner_step(net, rate):
    (gradient,) = torch.autograd.grad(
        F.linear(tensor(3, 5), net.first.weight).square().mean(), net.first.weight, create_graph=True
    )
    return net.first.weight - rate * gradient


# The shape of a leaf, and the weight of the first layer of a network that it makes.
WEIGHTS = {
    "a perturbation": ((6, 5), lambda leaf, net: net.first.weight + leaf),
    "a rate": ((), lambda leaf, net: inner_step(net, leaf)),
    "rates of rows": ((6, 1), lambda leaf, net: inner_step(net, leaf)),
    "a factor of low rank": ((6, 2), lambda leaf, net: net.first.weight + leaf @ (leaf.t() @ net.first.weight)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_leaf_that_all_examples_share(name):
    shape, weight = WEIGHTS[name]
    shared = leaf(*shape)
    model = engm.GradNormModule(Net(lambda net, x: weight(shared, net)))
    for seed in range(3):
        losses = model(tensor(N, 5, seed=seed))
        truth = per_example_gradients(losses, trained(model)).norms
        assert relative(engm.per_example_grad_norms(model, losses), truth) <= 1e-9


def test_what_the_network_is_given_is_data():
    model = engm.GradNormModule(Net(lambda net, x: net.first.weight + x.mean(0)))
    with pytest.raises(RefusedError, match="an input that requires grad"):
        engm.per_example_grad_norms(model, model(leaf(N, 5)))
