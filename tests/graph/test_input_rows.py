"""Norms of input gradients are of each loss's own rows, in whatever order the losses and the rows lie."""

import pytest
import torch
from oracle import random_losses, relative, tensor
from torch import nn

import engm

pytestmark = pytest.mark.torch_insides


class Ordered(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x, order):
        return self.last(torch.tanh(self.first(x))[order])


def norms_of(losses, x):
    return torch.stack([torch.autograd.grad(loss, x, retain_graph=True)[0].norm() for loss in losses])


def orders(n):
    return [torch.randperm(n, generator=torch.Generator().manual_seed(k)) for k in (0, 0, 1, 2, 2)]


@pytest.mark.parametrize("norms", [True, False])
def test_losses_in_any_order(norms):
    model, x = engm.GradNormModule(Ordered().double()), tensor(7, 4).requires_grad_()
    for order in orders(7):
        losses = random_losses(model(x, order))
        found = engm.measure(model, losses, x, norms=norms).input_norms
        assert relative(found, norms_of(losses, x)) <= 1e-9


def test_naive_engm_weighs_by_them():
    net, x = Ordered().double(), tensor(7, 4).requires_grad_()
    model = engm.GradNormModule(net)
    opt = engm.NENGM(model, torch.optim.SGD(net.parameters(), 0.1), 0.1)
    for order in orders(7):
        losses = random_losses(model(x, order))
        expected = norms_of(losses, x)
        assert relative(opt.backward(losses, x).weights, (0.1 / expected).clamp(max=1)) <= 1e-9


@pytest.mark.parametrize("layout", [lambda x: torch.cat([x, x.flip(0)]), lambda x: x.repeat_interleave(2, 0)])
def test_several_rows_an_example(layout):
    model = engm.GradNormModule(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double())
    x = layout(tensor(5, 4)).requires_grad_()
    rows = random_losses(model(x))
    owners = layout(torch.arange(5.0)[:, None]).flatten().long()
    losses = torch.zeros(5, dtype=torch.float64).index_add(0, owners, rows)
    assert relative(engm.measure(model, losses, x).input_norms, norms_of(losses, x)) <= 1e-9


@pytest.mark.parametrize("shape", [(4, 6), (6, 6), (4, 2, 6)])
def test_examples_along_the_last_dimension(shape):
    """Rows are of several examples there, and elements are not."""

    class FeaturesFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(torch.Size(shape[:-1]).numel(), 3)

        def forward(self, x):
            return self.layer(x.movedim(-1, 0).flatten(1))

    model = engm.GradNormModule(FeaturesFirst().double())
    for step in range(3):
        x = tensor(*shape, seed=step).requires_grad_()
        losses = random_losses(model(x))
        assert relative(engm.measure(model, losses, x).input_norms, norms_of(losses, x)) <= 1e-9


def test_an_input_without_elements():
    """As many images as there are in the batch, which may be none."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, images):
            return self.layer(x + torch.cat([images, images.new_zeros(1, 4)]).sum(0))

    model = engm.GradNormModule(Both().double())
    x, images = tensor(5, 4).requires_grad_(), tensor(0, 4).requires_grad_()
    losses = random_losses(model(x, images))
    assert relative(engm.measure(model, losses, (x, images)).input_norms, norms_of(losses, x)) <= 1e-9


ORDER = torch.tensor([0, 1, 2, 3, 7, 6, 5, 4])


def by_turns(copies, step):
    """Adds up two copies ``[2, 4, 4]``, of which the second is in another order and one counts nothing at first."""
    mask = torch.tensor([[[1, 1, 1, 1], [0, 0, 0, 0]], [[0, 0, 0, 0], [1, 1, 1, 1]], [[1, 0, 1, 0], [0, 1, 0, 1]]])[
        step
    ]
    return (copies * mask[..., None]).reshape(8, 4)[ORDER].view(2, 4, 4).sum(0)


READERS = {
    "in another order": lambda x, step: x[ORDER[:4].roll(step)],
    "expanded": lambda x, step: by_turns(x[None].expand(2, 4, 4), step),
    "added to": lambda x, step: by_turns(x[None] + x.new_ones(2, 1, 1), step),
    "stacked": lambda x, step: by_turns(torch.stack([x, x]), step),
    "between constants": lambda x, step: torch.cat([x.new_zeros(step, 4), x[:2], x.new_zeros(2 - step, 4)]),
    "joined to constants": lambda x, step: torch.cat([x.new_zeros(step, 4), x, x.new_zeros(2 - step, 4)])[1:5],
    "multiplied": lambda x, step: torch.eye(4, dtype=x.dtype).roll(step, 0) @ x,
    "read twice": lambda x, step: x * (step == 0) + x.flip(0) * (step == 1) + x.roll(1, 0) * (step == 2),
}


@pytest.mark.parametrize("name", sorted(READERS))
def test_inputs_whose_rows_are_moved_at_once(name):
    """No layer lies between the input and what moves its rows."""

    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, step):
            return self.layer(READERS[name](x, step))

    model, x = engm.GradNormModule(Moved().double()), tensor(4, 4).requires_grad_()
    for step in (0, 1, 2, 0, 1):
        losses = random_losses(model(x, step))
        assert relative(engm.measure(model, losses, x).input_norms, norms_of(losses, x)) <= 1e-9


def test_masks_that_part_the_examples_later_on():
    """At first every example's rows lie in the usual order; nothing of that holds when the mask is another."""

    class Mirrored(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, mask):
            return self.layer(torch.where(mask, x, x.flip(0)))

    model, x = engm.GradNormModule(Mirrored().double()), tensor(6, 4).requires_grad_()
    for mask in (torch.ones(6, 1, dtype=torch.bool), torch.zeros(6, 1, dtype=torch.bool)):
        losses = random_losses(model(x, mask))
        assert relative(engm.measure(model, losses, x).input_norms, norms_of(losses, x)) <= 1e-9
