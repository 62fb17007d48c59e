"""Tensors that are computed from the same parameters several times are told from those that only look alike."""

import pytest
import torch
import torch.nn.functional as F
from engine_checks import check
from oracle import random_losses, tensor
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from engm.rules.same_tensor import same_tensors

pytestmark = pytest.mark.torch_insides


def leaf(*shape, seed=1):
    return tensor(*shape, seed=seed).requires_grad_()


def places(*tensors):
    return same_tensors([(t.grad_fn, t.output_nr) for t in tensors])


@pytest.mark.parametrize(
    "compute",
    [
        lambda p: p.t(),
        lambda p: p[1],
        lambda p: p.exp(),
        lambda p: p.softmax(1) @ p,
        lambda p: (p * 2 + p.sum()).view(2, 8),
        lambda p: torch._weight_norm_interface(p, p.norm(dim=1, keepdim=True), 0)[0].t(),
        lambda p: F.normalize(p).unbind()[2],
        lambda p: F.layer_norm(p, (4,)).sin() * p.cos(),
        lambda p: torch.where(p > 0, p, 2 * p),
        lambda p: torch.linalg.matrix_exp(p.tril() - p.tril().mT),
        lambda p: torch.linalg.solve(p, p.t()) @ torch.linalg.inv(p),
    ],
)
def test_computed_twice(compute):
    p, q = leaf(4, 4), leaf(4, 4)
    assert places(compute(p), compute(q), compute(p), compute(q)) == [0, 1, 0, 1]


def test_different_options_and_outputs():
    p = leaf(4, 4)
    assert places(p[0], p[1], p[0]) == [0, 1, 0]
    first, second = p.chunk(2), p.chunk(2)
    assert places(first[0], first[1], second[1], second[0]) == [0, 1, 1, 0]
    assert places(p.sum(0), p.sum(1)) == [0, 1]


def test_different_data_that_is_no_parameter():
    p, data = leaf(4, 4), tensor(4, 4)
    assert places(p * data, p * (data + 1)) == [0, 1]
    assert places(p * data, p * data) == [0, 0]
    assert places(F.dropout(p), F.dropout(p)) == [0, 1]


def test_a_parameter_changed_in_between():
    p = leaf(4)
    before = p.exp()
    with torch.no_grad():
        p += 1
    assert places(before, p.exp()) == [0, 1]


def test_an_operator_that_is_not_known_to_show_all():
    p = leaf(4, 4)
    sizes = [[torch.ones(rows, 4), p, torch.ones(3 - rows, 4)] for rows in (1, 2)]
    assert places(*map(torch.cat, sizes)) == [0, 1]
    assert places(p.as_strided((2, 2), (1, 2)), p.as_strided((2, 2), (2, 1))) == [0, 1]


@pytest.mark.parametrize("name", ["Scaled", "Mul"])
def test_a_function_of_the_users(name):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, p, factor):
            ctx.factor = factor
            return p * factor

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.factor, None

    Scaled = type(name, (Scaled,), {})
    p = leaf(4)
    assert places(Scaled.apply(p, 2), Scaled.apply(p, 3)) == [0, 1]


@pytest.mark.parametrize("parametrize", [weight_norm, spectral_norm])
@pytest.mark.parametrize("training", [True, False])
def test_a_weight_computed_at_every_step(parametrize, training):
    """Spectral norm in training mode computes another weight at every step, from buffers that it changes."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.into, self.out = parametrize(nn.Linear(5, 5)), nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            h = x.new_zeros(len(x), 5)
            for step in x.unbind(1):
                h = torch.tanh(self.into(step) + self.cell(h))
            return self.out(h)

    net = Recurrent().double().train(training)
    if parametrize is weight_norm or not training:
        check(net, lambda m: random_losses(m(tensor(3, 4, 3))))


def test_uses_of_a_parameter_itself_and_of_tensors_made_of_it():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(tensor(4, 4))

        def forward(self, x):
            h = torch.tanh(x @ self.p + x @ self.p.exp())
            return torch.tanh(h @ self.p.exp()) @ self.p.tanh() + h @ self.p[1:].t() @ self.p[:3]

    check(Both().double(), lambda m: random_losses(m(tensor(3, 4))))
