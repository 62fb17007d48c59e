"""Parts of tensors that are written into, and examples along columns: plans are kept, and hold for what they say."""

import pytest
import torch
from oracle import per_example_gradients, relative, tensor, trained
from torch import nn

import engm
from engm.backward import prepare
from engm.checks import RefusedError
from engm.graph.routed import plan_to_be_told

pytestmark = pytest.mark.torch_insides
N, WIDTH = 5, 4


class Stored(nn.Module):
    """A recurrence that writes its states into a tensor."""

    def __init__(self):
        super().__init__()
        self.cell, self.read = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        states, h = x.new_zeros(len(x), 6, WIDTH), x.new_zeros(len(x), WIDTH)
        for t in range(6):
            h = torch.tanh(self.cell(torch.cat([x, h], 1)))
            states[:, t] = h
        states[:, 1:3].add_(x[:, None])
        states[:, 0].zero_()
        return self.read(states.mean(1))


class Modes(nn.Module):
    """The lowest frequencies, written into a spectrum."""

    def __init__(self):
        super().__init__()
        self.weight, self.lift = nn.Parameter(torch.randn(2, 2, 3, dtype=torch.cdouble)), nn.Conv1d(1, 2, 1)

    def forward(self, x):
        spectrum = torch.fft.rfft(self.lift(x[:, None]))
        out = torch.zeros_like(spectrum)
        out[:, :, :3] = torch.einsum("bim,iom->bom", spectrum[:, :, :3], self.weight)
        return torch.fft.irfft(out, n=4).flatten(1)


class Columns(nn.Module):
    """Every example a column, as mathematics has it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, WIDTH)), nn.Parameter(torch.randn(2, 3, 6))
        self.places = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        h = torch.tanh(self.a @ x.t())
        h = torch.bmm(self.b, h.expand(2, -1, -1)).sum(0)
        return torch.cdist(self.places, h.t()).t()


def losses_of(model, x):
    return model(x).square().sum(1)


def assert_right(model, step):
    losses = losses_of(model, tensor(N, WIDTH, seed=step))
    wanted = per_example_gradients(losses, trained(model.unwrap())).norms
    assert relative(engm.per_example_grad_norms(model, losses), wanted) < 1e-10


@pytest.mark.parametrize("network", [Stored, Modes, Columns])
def test_plans_are_kept(network, monkeypatch):
    made = []
    make_plan = prepare.make_plan
    monkeypatch.setattr(prepare, "make_plan", lambda *args: made.append(make_plan(*args)) or made[-1])
    torch.manual_seed(0)
    model = engm.GradNormModule(network().double())
    for step in range(4):
        assert_right(model, step)
    assert len(made) == 1


class Placed(nn.Module):
    """Writes where the data say."""

    def __init__(self):
        super().__init__()
        self.first, self.read = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x, place):
        h = torch.tanh(self.first(x))
        out = torch.zeros(N + 2, WIDTH, dtype=x.dtype)
        out[place : place + N] = h
        return self.read(out[2:] + h)


def test_another_place_is_another_plan():
    model = engm.GradNormModule(Placed().double())
    x = tensor(N, WIDTH)
    losses = losses_of(lambda x: model(x, 2), x)
    wanted = per_example_gradients(losses, trained(model.unwrap())).norms
    assert relative(engm.per_example_grad_norms(model, losses), wanted) < 1e-10
    with pytest.raises(RefusedError, match="influences the losses of other examples"):
        engm.per_example_grad_norms(model, losses_of(lambda x: model(x, 1), x))


class Packed(nn.Module):
    """Examples side by side along a dimension that nothing but zeros keeps apart, told by single elements."""

    def __init__(self):
        super().__init__()
        self.read, self.scale = nn.Linear(WIDTH, 3), nn.Parameter(torch.randn(3, 1))

    def forward(self, x):
        apart = torch.block_diag(*[torch.ones(2, 2, dtype=x.dtype)] * N)
        h = torch.tanh(self.scale * self.read(x).t().repeat_interleave(2, 1))
        return (h @ apart).unflatten(1, (N, 2)).sum(2).t()


def test_what_cannot_be_told_is_tried_three_times(monkeypatch):
    tried = []
    monkeypatch.setattr(prepare, "plan_to_be_told", lambda *args: tried.append(1) or plan_to_be_told(*args))
    model = engm.GradNormModule(Packed().double())
    for step in range(12):
        assert_right(model, step)
    assert len(tried) == 3
