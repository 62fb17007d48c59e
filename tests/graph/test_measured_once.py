"""Networks that move no rows by data are measured at the first step alone, in whatever order the examples lie."""

import pytest
import torch
from oracle import per_example_gradients, random_losses, relative, tensor, trained
from torch import nn

import engm
from engm.backward import prepare


class Between(nn.Module):
    """Two layers, with tokens ``[n, 3, 4]`` in between."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.between(torch.tanh(self.first(x)))).mean(1)


class StacksOfParameters(Between):
    """As relative positions are multiplied: examples along the rows of a stack, a shared matrix on the right."""

    def __init__(self):
        super().__init__()
        self.matrices = nn.Parameter(tensor(3, 4, 4))

    def between(self, h):
        return torch.einsum("ntc,tcd->ntd", h, self.matrices)


class SharedOnTheRight(Between):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 4)

    def between(self, h):
        rows = h.transpose(0, 1).reshape(1, -1, 4)  # in order of time
        rows = torch.bmm(rows, self.table(torch.arange(4))[None])
        return rows.view(3, -1, 4).transpose(0, 1)


class Fourier(Between):
    def between(self, h):
        return torch.fft.fftn(h, dim=(1, 2)).real


class ComplexNumbers(Between):
    def between(self, h):
        return torch.view_as_real(torch.view_as_complex(h.reshape(-1, 3, 2, 2)) ** 2).flatten(2)


class InOrderOfTime(Between):
    def between(self, h):
        return torch.fft.fft(h.transpose(0, 1), dim=2, norm="ortho").abs().transpose(0, 1)


@pytest.mark.parametrize("kind", [StacksOfParameters, SharedOnTheRight, Fourier, ComplexNumbers, InOrderOfTime])
@pytest.mark.parametrize("n", [2, 5])
def test_measured_once(kind, n, monkeypatch):
    made, original = [], prepare.make_plan
    monkeypatch.setattr(prepare, "make_plan", lambda *args: made.append(1) or original(*args))
    torch.manual_seed(0)
    net = kind().double()
    model = engm.GradNormModule(net)
    for _ in range(3):
        losses = random_losses(model(torch.randn(n, 3, 4, dtype=torch.float64)))
        truth = per_example_gradients(losses, trained(net))
        assert relative(engm.per_example_grad_norms(model, losses), truth.norms) < 1e-9
    assert len(made) == 1
