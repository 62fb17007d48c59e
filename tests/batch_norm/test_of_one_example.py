"""Batch norms whose statistics are one example's alone, where no example influences another, and those of a part."""

import pytest
import torch
import torch.nn.functional as F
from oracle import per_example_gradients, random_losses, tensor, truth
from torch import nn

import engm


class Between(nn.Module):
    """A norm between two layers that work on rows ``[n, 4, 3]``."""

    def __init__(self, norm, inner=None):
        super().__init__()
        self.first, self.last, self.norm, self.inner = nn.Linear(3, 5), nn.Linear(5, 1), norm, inner

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x), self.inner))).square().mean((1, 2))


def one_by_one(h, batch_norm):
    return torch.stack([batch_norm(one) for one in h])


def functional(h, _):
    return torch.stack([F.batch_norm(one, None, None, training=True) for one in h])


def of_channels(h, batch_norm):
    return batch_norm(h.mT).mT


def as_channels(h, batch_norm):
    return batch_norm(h.mT.reshape(1, -1, h.shape[1])).view_as(h.mT).mT


NETWORKS = {
    "a layer, one by one": (one_by_one, nn.BatchNorm1d(5), 3),
    "a function, one by one": (functional, None, 2),
    "an instance norm of one example": (lambda h, _: F.instance_norm(h.mT).mT, None, 1),
    "one example": (of_channels, nn.BatchNorm1d(5), 1),
    "as an instance norm": (as_channels, nn.BatchNorm1d(10, affine=False), 2),
    "as an affine instance norm": (as_channels, nn.BatchNorm1d(10), 2),
    "as a layer norm": (lambda h, b: b(h.flatten(0, 1).t()).t().view_as(h), nn.BatchNorm1d(8, affine=False), 2),
}


def compared(model, losses):
    """Norms by engm and by one backpropagation an example through the same graph."""
    parameters = dict(model.unwrap().named_parameters())
    return engm.per_example_grad_norms(model, losses), per_example_gradients(losses, parameters).norms


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_are_exact(name):
    norm, inner, n = NETWORKS[name]
    model = engm.GradNormModule(Between(norm, inner).double())
    for step in range(3):
        found, wanted = compared(model, model(tensor(n, 4, 3, seed=step)))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


def test_of_the_whole_batch_they_are_estimates():
    """What the tests above would be without a look at whose statistics they are."""
    model = engm.GradNormModule(Between(of_channels, nn.BatchNorm1d(5)).double())
    found, wanted = compared(model, model(tensor(3, 4, 3)))
    assert not torch.allclose(found, wanted, rtol=1e-3)


def halves(h, batch_norm):
    norm = batch_norm or (lambda part: F.batch_norm(part, None, None, training=True))
    return torch.cat([norm(part.flatten(0, 1)).view_as(part) for part in h.chunk(2)])


@pytest.mark.parametrize("inner", [nn.BatchNorm1d(5), None], ids=["a layer", "a function"])
def test_of_half_of_the_batch(inner):
    """Rows of a half are a multiple of n, as those of the whole batch would be."""
    net = Between(halves, inner).double()
    with pytest.raises(RuntimeError, match="influences the losses of other examples"):
        engm.per_example_grad_norms(model := engm.GradNormModule(net), model(tensor(4, 4, 3)))
    model = engm.GradNormModule(net, coupled="exact")
    found, wanted = compared(model, model(tensor(4, 4, 3)))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


class Ragged(nn.Module):
    """A batch norm over the rows of all examples, of which every example has another number."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x, owners):
        h = torch.tanh(self.norm(self.first(x)))
        return self.last(h.new_zeros(int(owners.max()) + 1, 5).index_add(0, owners, h))


SILENT = {
    "constant": lambda losses, kept: torch.where(kept, losses, losses.detach()),
    "masked": lambda losses, kept: losses * kept,
    "masked, and scaled": lambda losses, kept: 2 * (losses * kept) + 1,
}


@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (2, 3, 1, 4), (1, 5, 1, 1)], ids=str)
@pytest.mark.parametrize("name", SILENT)
def test_of_the_whole_batch_though_an_example_has_no_loss(name, sizes):
    """Its rows have no gradient, and the batch norm is no less one of all examples."""
    net = Ragged().double()
    owners, x = torch.repeat_interleave(torch.tensor(sizes)), tensor(sum(sizes), 3)
    model = engm.GradNormModule(net, batch_norm="frozen")
    for silent in (1, 0, 3):
        kept = torch.arange(len(sizes)) != silent

        def losses(net, kept=kept):
            return SILENT[name](random_losses(net(x, owners)), kept)

        measured = engm.measure(model, losses(model))
        assert measured.mode == "frozen"
        wanted = truth(net, losses, frozen=True)
        torch.testing.assert_close(measured.norms, wanted.norms, rtol=1e-9, atol=1e-12)


class OwnChannels(nn.Module):
    """A batch norm in which every example has channels of its own, behind a gate an example."""

    def __init__(self):
        super().__init__()
        self.layer, self.gain = nn.Linear(6, 6), nn.Parameter(torch.randn(6))

    def forward(self, x, gates):
        h = self.layer(x)
        n, rows, width = h.shape
        channels = h.transpose(0, 1).reshape(rows, -1)
        y = F.batch_norm(channels, None, None, self.gain.repeat(n), training=True)
        return 0.3 * h + y.view(rows, n, width).transpose(0, 1) * gates.view(-1, 1, 1)


GATES = [(1, 1, 1, 1), (1, 1, 1, 0), (1, 0, 1, 1), (0, 0, 1, 0), (0, 0, 0, 0), (1, 1, 0, 0), (0, 0, 1, 1)]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 1, 3, 2), (2, 3, 0, 1)], ids=str)
def test_of_channels_of_which_some_have_no_gradient(order):
    model = engm.GradNormModule(OwnChannels().double())
    for seed, gates in enumerate(GATES):
        losses = random_losses(model(tensor(4, 5, 6, seed=seed), torch.tensor(gates)).flatten(1))[list(order)]
        found, wanted = compared(model, losses)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


def test_of_one_example_a_pass_of_which_some_have_no_gradient():
    """Step by step another one of the passes is silent, and every graph is looked at twice."""
    model = engm.GradNormModule(OwnChannels().double())
    for seed, gates in enumerate([(1, 0), (0, 1), (1, 1), (0, 1)]):
        x = tensor(2, 4, 6, seed=seed)
        y = [model(x[i : i + 1], torch.tensor([float(gate)])) for i, gate in enumerate(gates)]
        losses = random_losses(torch.cat(y).flatten(1))
        for _ in range(2):
            found, wanted = compared(model, losses)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


def test_of_the_whole_batch_though_every_channel_has_a_gradient_of_one_example_alone():
    """It seems to be of one example a channel; what lies below it tells otherwise."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x, mask):
            h = F.batch_norm(self.layer(x), None, None, training=True)
            return (h * mask).square().sum(1)[[1, 0, 2]] + self.layer(x).sum(1)[[1, 0, 2]]

    model = engm.GradNormModule(Network().double(), batch_norm="frozen")
    mask = torch.zeros(3, 6, dtype=torch.float64)
    mask[0, :3], mask[2, 3:] = 1, 1
    assert engm.measure(model, model(tensor(3, 6), mask)).mode == "frozen"


def test_a_layer_one_by_one_of_which_some_have_no_gradient():
    """Which rows of an example have one hangs on the data."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

        def forward(self, x, gates):
            h = self.layer(x).view(len(x), -1, 6)
            rows = torch.stack([self.norm(one) for one in h]).amax(2) * gates[:, None]
            return h.sum((1, 2)) + rows.relu().sum(1)

    model = engm.GradNormModule(Network().double())
    for seed, gates in enumerate([(1, 0, 1, 1), (1, 1, 1, 1), (0, 0, 1, 1), (0, 1, 0, 0)]):
        losses = model(tensor(4, 5, 6, seed=seed), torch.tensor(gates, dtype=torch.float64))[[0, 1, 3, 2]]
        found, wanted = compared(model, losses)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
