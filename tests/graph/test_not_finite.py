"""Gradients that are not finite when the owners of rows are measured: they count for nobody who cannot have them."""

import pytest
import torch
from oracle import per_example_gradients, relative, tensor, trained
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import engm

pytestmark = pytest.mark.torch_insides

N = 5
OWN = torch.tensor([3, 0, 1, 1, 4, 2, 0, 3, 2, 4, 4])  # of rows in an order of the data


class Rows(nn.Module):
    """Rows of any order: the owners of the culprit's are those of no layout."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x):
        values = self.last(torch.tanh(self.first(x.repeat(3, 1)[: len(OWN)]))).squeeze(1).square()
        return values.new_zeros(N).index_add(0, OWN, values)


class Plain(Rows):
    def forward(self, x):
        return self.last(torch.tanh(self.first(x))).squeeze(1).square()


class Generated(nn.Module):
    """A weight that a layer makes, in which all examples have a share."""

    def __init__(self):
        super().__init__()
        self.make, self.last = nn.Linear(2, 12), nn.Linear(4, 1)

    def forward(self, x):
        weight = self.make(torch.ones(2, dtype=x.dtype)).view(4, 3)
        return self.last(torch.tanh(nn.functional.linear(x, weight))).squeeze(1).square()


def normalised():
    net = Plain()
    weight_norm(net.first)
    return net


NETWORKS = {"rows": Rows, "plain": Plain, "generated": Generated, "weight norm": normalised}


def spoiled(losses, culprit, value):
    """The losses, of which one is not finite (``value``), or has a gradient that is not (None)."""
    place = torch.tensor([culprit])
    if value is None:
        return losses.index_add(0, place, (losses[culprit : culprit + 1] * 0).sqrt())
    return losses.index_add(0, place, losses[culprit : culprit + 1] * value)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("culprit", [0, 2, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_finite_norm_is_wrong(name, culprit, value):
    """At the first step: the culprit has none, others have their own, or none where nothing tells whose rows are."""
    torch.manual_seed(culprit)
    net = NETWORKS[name]().double()
    model, x = engm.GradNormModule(net), tensor(N, 3)
    want = per_example_gradients(net(x), trained(net)).norms
    norms = engm.measure(model, spoiled(model(x), culprit, value), check=False).norms
    others = torch.arange(N) != culprit
    assert not norms[culprit].isfinite()
    if name == "plain" or (name == "rows" and value is not None):
        assert bool(norms[others].isfinite().all())
    assert relative(norms.where(norms.isfinite(), want), want) < 1e-9
    assert relative(engm.measure(model, model(x)).norms, want) < 1e-9, "the step after it"


@pytest.mark.parametrize("value", [None, float("nan")])
def test_input_norms(value):
    class Ragged(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, rows):
            values = torch.tanh(self.layer(rows)).squeeze(1).square()
            return values.new_zeros(N).index_add(0, OWN, values)

    model = engm.GradNormModule(Ragged().double())
    rows = tensor(len(OWN), 3).requires_grad_()
    losses = model(rows)
    want = [torch.autograd.grad(loss, rows, retain_graph=True)[0].norm() for loss in losses]
    found = engm.measure(model, spoiled(losses, 2, value), inputs=rows, check=False).input_norms
    assert not found[2].isfinite()
    assert bool(found[[0, 1, 3, 4]].isfinite().all()) == (value is not None)
    want = torch.stack(want)
    assert relative(found.where(found.isfinite(), want), want) < 1e-9
