"""Gradients that vanish on their way through a long recurrence: plans are kept, and norms right when they return."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import per_example_gradients, trained
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import engm
from engm.backward import prepare
from engm.graph.owners import NOBODY, SEVERAL, Owned, Print, _factors, hardly, numbers_of, unnoticed, vanishing
from engm.graph.planning import make_plan

pytestmark = pytest.mark.torch_insides
N, WIDTH, STEPS = 6, 6, 300


class Recurrence(nn.Module):
    def __init__(self, cell, step):
        super().__init__()
        self.cell, self.step, self.inp, self.out = cell, step, nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x):
        h = x.new_zeros(len(x), WIDTH)
        for t in range(x.shape[1]):
            h = self.step(self.cell, self.inp(x[:, t]), h)
        return self.out(h)


class OwnLstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTMCell(3, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.out(state[0])


def gated(cell, x, h):
    gate, new = cell(h).chunk(2, 1)
    return h * gate.sigmoid() + (x + new).tanh() * (1 - gate.sigmoid())


NETWORKS = {
    "plain": lambda: Recurrence(nn.Linear(WIDTH, WIDTH), lambda cell, x, h: torch.tanh(x + cell(h))),
    "GRU cell": lambda: Recurrence(nn.GRUCell(WIDTH, WIDTH), lambda cell, x, h: cell(x, 0.7 * h)),
    "LSTM cell": OwnLstm,
    "gated": lambda: Recurrence(nn.Linear(WIDTH, 2 * WIDTH), gated),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_plan_is_kept_until_gradients_return(monkeypatch, name):
    torch.manual_seed(0)
    net = NETWORKS[name]()
    model = engm.GradNormModule(net)
    made, before = [], 1
    monkeypatch.setattr(prepare, "make_plan", lambda *args, make=make_plan: made.append(1) or make(*args))
    for step in range(5):
        x = torch.randn(N, STEPS, 3)
        larger = 1e17 if step == 3 else 1.0  # of the losses, so that their gradients get further
        found = engm.per_example_grad_norms(model, larger * model(x).square().mean(1))
        if step >= 2:
            exact = copy.deepcopy(net).double()
            wanted = per_example_gradients(larger * exact(x.double()).square().mean(1), trained(exact)).norms
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)
        # Gradients of other data may get a little further.
        assert len(made) == before + 1 if step == 3 else len(made) <= before + (step in (1, 2)), step
        before = len(made)


@given(
    size=st.integers(-150, 0),
    spread=st.integers(0, 20),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    n=st.integers(2, 9),
    width=st.sampled_from([1, 2]),
)
def test_numbers_that_are_not_normal_are_nobodys(size, spread, dtype, n, width):
    """Rows of one example each, of which rounding leaves a few bits or none, never look like rows of several."""
    numbers = numbers_of(n, False)
    exact = torch.randn(n, width, dtype=torch.float64) * torch.exp2(-spread * torch.rand(n, 1) + size)
    if dtype == torch.float64:
        exact = exact * 2.0**-900
    marks = exact.to(dtype)
    owned = Owned({"rows": Print((n,), marks, dtype)})
    for place in numbers.places:
        factors = _factors(numbers.digits(place, n, torch.device("cpu"))).unsqueeze(1)
        owned.add_digit({"rows": Print((n,), (factors * exact).to(dtype), dtype)}, place)
    found = owned.owners(numbers, n)
    assert ((found == torch.arange(n)) | (found == NOBODY)).all()
    largest = marks.abs().amax(1)
    assert (found[largest >= vanishing(dtype)] >= 0).all()
    left = owned.without_vanished(found)
    gone = largest.max() < hardly(dtype) and largest.min() < vanishing(dtype)
    assert torch.equal(left, torch.full_like(left, NOBODY) if gone else found)


@given(size=st.integers(-150, 0), n=st.integers(2, 40))
def test_shares_that_cancel_are_of_several(size, n):
    """The plain gradient is zero, those of scaled losses are not, and are no smaller than what counts."""
    numbers = numbers_of(n, False)
    shares = torch.randn(n, dtype=torch.float64)
    shares[0] -= shares.sum()
    shares = (shares * 2.0**size).float().double()
    shares[0] -= shares.sum()
    owned = Owned({"rows": Print((1,), shares.sum().view(1, 1).float(), torch.float32)})
    largest = 0.0
    for place in numbers.places:
        scaled = (_factors(numbers.digits(place, n, torch.device("cpu"))) * shares).sum().view(1, 1).float()
        largest = max(largest, float(scaled.abs()))
        owned.add_digit({"rows": Print((1,), scaled, torch.float32)}, place)
    found = owned.without_vanished(owned.owners(numbers, n))
    assert found.item() == (SEVERAL if largest >= hardly(torch.float32) else NOBODY)


def test_nothing_vanishes_in_float16():
    assert vanishing(torch.float16) == unnoticed(torch.float16) == 0
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.full((), unnoticed(dtype), dtype=dtype).square() < torch.finfo(dtype).tiny


class FromState(nn.Module):
    """A recurrence with a weight that is computed anew at every step, from a state that is given."""

    def __init__(self):
        super().__init__()
        self.cell, self.inp, self.out = spectral_norm(nn.Linear(WIDTH, WIDTH)), nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x, h):
        for t in range(x.shape[1]):
            h = torch.tanh(self.inp(x[:, t]) + self.cell(h))
        return self.out(h)


def test_a_weight_that_is_multiplied_by_zeros_is_watched(monkeypatch):
    torch.manual_seed(0)
    net = FromState().double()
    model = engm.GradNormModule(net)
    made = []
    monkeypatch.setattr(prepare, "make_plan", lambda *args, make=make_plan: made.append(1) or make(*args))
    for step in range(5):
        x, h = torch.randn(N, 4, 3).double(), torch.randn(N, WIDTH).double() * (step == 3)
        exact = copy.deepcopy(net)  # the norm goes on with its power iteration
        found = engm.per_example_grad_norms(model, model(x, h).square().sum(1))
        wanted = per_example_gradients(exact(x, h).square().sum(1), trained(exact)).norms
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
        assert len(made) == 1 + (step >= 3)
