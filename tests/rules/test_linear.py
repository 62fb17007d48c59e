"""Linear layers against the oracle: any leading dimensions, sharing, and what users do around them."""

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from engine_checks import TOLERANCE, check
from hypothesis import given
from hypothesis import strategies as st
from oracle import dtype_of, random_losses, relative, tensor
from torch import nn

import engm
from engm.capture import calls
from engm.rules import linear

dtypes = st.sampled_from([torch.float64, torch.float32])


def losses_of(x, seed=0):
    return lambda net: random_losses(net(x.to(dtype_of(net))), seed)


@given(
    n=st.integers(1, 5),
    lead=st.lists(st.integers(1, 5), max_size=3),
    p=st.integers(1, 9),
    d=st.integers(1, 9),
    trained=st.sampled_from(["both", "weight", "bias", "no bias"]),
    strided=st.booleans(),
    dtype=dtypes,
    seed=st.integers(0, 99),
)
def test_any_shape(n, lead, p, d, trained, strided, dtype, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(p, d, bias=trained != "no bias").to(dtype)
    if trained in ("weight", "bias"):
        getattr(layer, "bias" if trained == "weight" else "weight").requires_grad_(False)
    step = 2 if strided else 1
    x = tensor(n, *lead, step * p, seed=seed, dtype=dtype)[..., ::step]
    check(nn.Sequential(layer), losses_of(x, seed))


@given(n=st.integers(1, 4), t=st.integers(1, 40), seed=st.integers(0, 9), dtype=dtypes)
def test_behind_other_layers(n, t, seed, dtype):
    """Gradients pass through both layers, and T runs across the choice between the two forms."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5)).to(dtype)
    check(net, losses_of(tensor(n, t, 6, seed=seed, dtype=dtype), seed))


def test_one_position_is_a_product_of_norms():
    layer = nn.Linear(5, 3, bias=False).double()
    model = engm.GradNormModule(nn.Sequential(layer))
    x, c = tensor(4, 5), tensor(4, 3, seed=1)
    measured = engm.measure(model, (model(x) * c).sum(1))
    assert relative(measured.norms, x.norm(dim=1) * c.norm(dim=1)) <= TOLERANCE["norm, float64"]


@pytest.mark.parametrize("mean", [100.0, 1000.0])
def test_large_activation_mean_does_not_cancel(mean):
    """Gradients far below the product of the factors' norms: backprops that sum to almost nothing over positions."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64, bias=False))
    x = tensor(4, 8, 64, dtype=torch.float32) + mean
    c = tensor(4, 8, 64, seed=1, dtype=torch.float32)
    c = c - c.mean(1, keepdim=True)
    check(net, lambda m: (m(x.to(dtype_of(m))) * c.to(dtype_of(m))).flatten(1).sum(1), step=False)


@pytest.mark.parametrize("after", [nn.ReLU(inplace=True), nn.Dropout(0.0), nn.LeakyReLU(0.1, inplace=True)])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_in_place_activation_after_it(after, lead):
    """With leading dimensions the output is a view of a matrix, whose history an in-place operation rewrites."""
    net = nn.Sequential(nn.Linear(5, 6), after, nn.Linear(6, 4), after).double()
    check(net, losses_of(tensor(3, *lead, 5)))


def test_in_place_arithmetic_on_its_output():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x):
            h = self.a(x)
            h += x
            h.mul_(0.5).clamp_(min=-0.3)
            h[:, 0] = 0.0
            out = self.b(h)
            out[..., :2] *= 3.0
            return out

    check(Net().double(), losses_of(tensor(3, 4, 5)))


class Twice(nn.Module):
    """One layer called on two sequences of different length, in one loss."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(self.layer(x))
        return torch.cat([self.head(h), self.head(torch.relu(self.layer(h[:, :2])))], 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [1, 4])
def test_called_twice_with_different_lengths(dtype, n):
    check(Twice().to(dtype), losses_of(tensor(n, 6, 5, dtype=dtype)))


def test_squared_norms_of_the_uses_do_not_add():
    """The cross term matters here: without it this test would not tell a right engine from a wrong one."""

    class Opposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x) - 0.9 * self.layer(x)

    net = Opposed().double()
    x = tensor(3, 4)
    both = check(net, lambda m: m(x).sum(1)).norms
    once = engm.measure(model := engm.GradNormModule(nn.Sequential(net.layer)), model(x).sum(1)).norms
    assert relative(both, 0.1 * once) <= TOLERANCE["norm, float64"]


@pytest.mark.parametrize("share_bias", [False, True])
def test_two_modules_share_a_weight(share_bias):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.b.weight = self.a.weight
            if share_bias:
                self.b.bias = self.a.bias

        def forward(self, x):
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))

    check(Tied().double(), losses_of(tensor(3, 4)))
    check(Tied().double(), losses_of(tensor(3, 2, 4)))


def test_keyword_argument_and_subclass():
    class Mine(nn.Linear):
        pass

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Mine(5, 3)

        def forward(self, x):
            return self.layer(input=x)

    check(Net().double(), losses_of(tensor(4, 2, 5)))


def test_bias_alone_needs_no_activations():
    """The input may change after the layer read it: autograd does not need it either."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
            self.b.weight.requires_grad_(False)

        def forward(self, x):
            h = self.a(x) + 0.0
            out = self.b(h)
            h.mul_(2.0)
            return out + h

    check(Net().double(), losses_of(tensor(3, 5)))


def test_zero_gradient():
    net = nn.Sequential(nn.Linear(4, 3)).double()
    model = engm.GradNormModule(net)
    measured = engm.measure(model, (model(tensor(3, 4)) * torch.tensor([[1.0], [0.0], [2.0]])).sum(1))
    assert measured.norms[1] == 0
    assert bool((measured.norms[[0, 2]] > 0).all())


def test_the_shift_of_a_softmax_has_gradient_zero():
    """Equal backprops of opposite sign: the bias gradient is a sum of a few roundings, not of squares."""
    net = nn.Sequential(nn.Linear(6, 1))
    x = tensor(4, 8, 6, dtype=torch.float32)
    model = engm.GradNormModule(net)
    measured = engm.measure(model, F.cross_entropy(model(x).squeeze(2), torch.tensor([0, 1, 2, 3]), reduction="none"))
    assert float(measured.squared_norms["0.bias"].sqrt().max()) <= 1e-6


# -- bilinear --------------------------------------------------------------------------------------------------------


class Pairing(nn.Module):
    """A bilinear layer on two views of the input, with layers on both sides."""

    def __init__(self, p, q, d, bias=True, keywords=False):
        super().__init__()
        self.left, self.right = nn.Linear(p, p), nn.Linear(p, q)
        self.pair, self.keywords = nn.Bilinear(p, q, d, bias=bias), keywords

    def forward(self, x):
        first, second = torch.tanh(self.left(x)), torch.tanh(self.right(x))
        if self.keywords:
            return self.pair(input2=second, input1=first)
        return self.pair(first, second)


@given(
    n=st.integers(1, 4),
    lead=st.lists(st.integers(1, 5), max_size=2),
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
    bias=st.booleans(),
    keywords=st.booleans(),
    dtype=dtypes,
    seed=st.integers(0, 99),
)
def test_bilinear(n, lead, sizes, bias, keywords, dtype, seed):
    torch.manual_seed(seed)
    net = Pairing(*sizes, bias=bias, keywords=keywords).to(dtype)
    check(net, losses_of(tensor(n, *lead, sizes[0], seed=seed, dtype=dtype), seed))


@pytest.mark.parametrize(("size", "factor"), [(1e10, 1e-20), (1e12, 1e-12), (1e-12, 1e24), (1e-12, 1e18)])
def test_bilinear_of_very_large_and_very_small_inputs(size, factor):
    """The product of two squared norms may be beyond float32 although that of all three is not."""
    torch.manual_seed(0)
    net = nn.Bilinear(3, 4, 5, bias=False)
    x, y = size * torch.randn(4, 3), size * torch.randn(4, 4)
    model = engm.GradNormModule(net)
    found = engm.per_example_grad_norms(model, factor * model(x, y).sum(1))
    expected = factor * x.double().norm(dim=1) * y.double().norm(dim=1) * 5**0.5
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_bilinear_with_one_parameter_frozen(frozen):
    net = Pairing(3, 4, 2).double()
    getattr(net.pair, frozen).requires_grad_(False)
    check(net, losses_of(tensor(3, 2, 3)))


def test_bilinear_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = nn.Bilinear(3, 3, 3)

        def forward(self, x):
            return self.pair(x, self.pair(x[:, :1], x[:, 1:2]).expand_as(x))

    check(Twice().double(), losses_of(tensor(3, 4, 3)))


def test_bilinear_in_chunks(monkeypatch):
    monkeypatch.setattr("engm.terms.linear.CHUNK_BYTES", 1)
    check(Pairing(3, 4, 2).double(), losses_of(tensor(5, 3, 3)))


def test_bilinear_of_two_views_of_an_example():
    x = tensor(6, 2, 3)

    def losses(m):
        first, second = m(x).chunk(2)
        return random_losses(first) + (first * second).flatten(1).sum(1)

    check(Pairing(3, 4, 2).double(), losses, views=2)


# Many calls on a row an example are taken together; one that is not small, and one with dimensions between, is not.
@given(
    n=st.integers(1, 5),
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    trained=st.lists(st.sampled_from(["both", "weight", "bias"]), min_size=6, max_size=6),
    few=st.sampled_from([0, 12, 1 << 16]),
    twice=st.booleans(),
    sparse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_together(n, widths, trained, few, twice, sparse, seed):
    torch.manual_seed(seed)
    layers = [nn.Linear(p, d).double() for p, d in pairwise(widths)]
    for layer, kind in zip(layers, trained, strict=False):
        layer.weight.requires_grad_(kind != "bias")
        layer.bias.requires_grad_(kind != "weight")
    shared = nn.Linear(widths[-1], widths[-1]).double()
    net = nn.Sequential(*layers, nn.Tanh(), shared, *([nn.Tanh(), shared] if twice else []))
    x = tensor(n, widths[0], seed=seed)
    with patch.object(linear, "FEW_ELEMENTS", few):
        check(net, losses_of(x.to_sparse() if sparse else x, seed))


def test_rows_under_autocast():
    """The activations of a layer in float32 with backprops in bfloat16, and no norm twice."""
    torch.manual_seed(0)
    model = engm.GradNormModule(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5)))
    x = tensor(4, 6, dtype=torch.float32)

    def norms(few):
        with patch.object(linear, "FEW_ELEMENTS", few), torch.autocast("cpu", torch.bfloat16):
            return engm.per_example_grad_norms(model, random_losses(model(x).float(), 0))

    assert torch.equal(norms(1 << 16), norms(0))


def test_rows_written_into_afterwards():
    """A function that changes the gradient in place after it was set aside would change norms; none are given out."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.mul_(2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(3, 4).double()

        def forward(self, x):
            doubled = Doubled.apply(self.first(x))
            return doubled + self.last(x)  # the same gradient goes to both, to the later one first

    model = engm.GradNormModule(Net())
    x = tensor(5, 3)
    with patch.object(calls, "QUEUED_BYTES", 0):
        losses = random_losses(model(x), 0)
        with pytest.raises(RuntimeError, match="modified in place"):
            engm.per_example_grad_norms(model, losses)
