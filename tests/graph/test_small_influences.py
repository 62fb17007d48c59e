"""Influences that are too small to show beside a row's own gradient, and grow: the norms are right, or refused.

Rows of other examples come by a gate that is open, nearly closed or closed, one gate a path.
"""

import copy
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import per_example_gradients, trained
from torch import nn

import engm
from engm.checks import RefusedError

pytestmark = pytest.mark.torch_insides
N, WIDTH = 5, 4
ORDER = torch.tensor([2, 0, 3, 4, 1])
INTO, FROM = torch.arange(N).repeat(2), torch.cat([torch.arange(N), ORDER])
PAIRS = torch.stack([torch.arange(N), ORDER], 1)


def every(rows):
    """The same index for every element of a row."""
    return rows[:, None].expand(-1, WIDTH)


def weights(gate, like):
    """One for every example's own row, and the gate for that of another."""
    return torch.cat([torch.ones(N).to(like), gate.expand(N)])[:, None]


def into(place, values, beside):
    """Both behind one another, the values written into a part of a tensor."""
    both = torch.zeros(N, 2, WIDTH, dtype=values.dtype)
    both[:, 1] = beside
    both[place] = values
    return both


def into_columns(values, beside):
    """The rows of both as columns of one tensor."""
    both = torch.zeros(2 * WIDTH, N, dtype=values.dtype)
    both[:WIDTH].t()[:] = values
    both.t()[:, WIDTH:] += beside
    return both.t()[:, :WIDTH] + both[WIDTH:].t()


def shifted(h, values):
    """Values added to the rows behind theirs, in place."""
    h = h.clone()
    h[1:] += values[:-1]
    return h


def multiplied(h, values):
    """The rows behind theirs multiplied by values, in place."""
    h = torch.cat([h, h[:1]])
    h[1:].mul_(values)
    return h[:-1]


PATHS = {
    "multiplied in place": lambda net, h, z, a, b: z + b * h + multiplied(a * h, z),
    "shifted": lambda net, h, z, a, b: h + torch.cat([torch.zeros(1, WIDTH).to(z), a * z[:-1]]) + b * z,
    "padded": lambda net, h, z, a, b: h + F.pad(a * z[:2], (0, 0, 1, N - 3)) + b * z,
    "pieces": lambda net, h, z, a, b: h + torch.cat([a * piece for piece in z.split([2, 3])][::-1]) + b * z,
    "one row twice": lambda net, h, z, a, b: h + torch.stack([z[0], b * z[1], a * z[0], *z.unbind(0)[3:]]) + z,
    "masked": lambda net, h, z, a, b: h + b * z + torch.zeros_like(z).masked_scatter(every(ORDER) > 1, a * z),
    "written": lambda net, h, z, a, b: into((slice(None), 0), a * z[ORDER] + h, b * z).sum(1),
    "written rows": lambda net, h, z, a, b: into((slice(1, 3), 0), a * z[:2], z + h).sum(1) + b * z,
    "written, one to all": lambda net, h, z, a, b: into((slice(None), 0), a * z[0], z + h).sum(1),
    "written columns": lambda net, h, z, a, b: into_columns(a * z[ORDER] + h, b * z),
    "added in place": lambda net, h, z, a, b: shifted(h + b * z, a * z),
    "columns": lambda net, h, z, a, b: h + (net.last.weight @ (a * z[ORDER] + b * z).t()).t(),
    "independent columns": lambda net, h, z, a, b: h + (net.last.weight @ (a * z + b * h).t()).t(),
    "independent, written": lambda net, h, z, a, b: into((slice(None), 0), a * z.flip(1), b * z + h).sum(1),
    "independent, written columns": lambda net, h, z, a, b: into_columns(a * z + h, b * z),
    "in another order": lambda net, h, z, a, b: h + a * z[ORDER] + b * z,
    "both in another order": lambda net, h, z, a, b: (a * z + h)[ORDER] + b * z[ORDER],
    "reversed and shifted": lambda net, h, z, a, b: h + a * z.flip(0) + b * net.last(z).roll(1, 0),
    "mean": lambda net, h, z, a, b: h + a * z.mean(0) + b * z,
    "product with an order": lambda net, h, z, a, b: h + a * (torch.eye(N)[ORDER].to(z) @ z) + b * z,
    "the larger one": lambda net, h, z, a, b: h + torch.maximum(a * z[ORDER] - 10 * (1 - a), b * z - 10),
    "rows of two": lambda net, h, z, a, b: h + torch.cat([a * z[ORDER][:2], b * z[2:]]),
    "added where an index says": lambda net, h, z, a, b: h.index_add(0, INTO, weights(a, z) * z[FROM]) + b * z,
    "of a table": lambda net, h, z, a, b: h.index_add(0, INTO, weights(a, z) * F.embedding(FROM, z)) + b * net.last(z),
    "gathered": lambda net, h, z, a, b: h.scatter_add(0, every(INTO), weights(a, z) * z.gather(0, every(FROM))),
    "bags": lambda net, h, z, a, b: (
        h + F.embedding_bag(PAIRS, z, per_sample_weights=weights(a, z).view(2, N).t(), mode="sum")
    ),
    "largest of bags": lambda net, h, z, a, b: (
        h + b * z + F.embedding_bag(PAIRS + torch.tensor([0, N]), torch.cat([z, a * z - 10 * (1 - a)]), mode="max")
    ),
    "the largest": lambda net, h, z, a, b: h + z + a * torch.zeros_like(z).scatter_reduce(0, every(ORDER), z, "amax"),
    "independent": lambda net, h, z, a, b: h + a * z + b * net.last(z).flip(1),
}
SIZES = {
    torch.float32: [0, 1e-40, 1e-36, 1e-30, 1e-24, 1e-18, 1e-8, 1],
    torch.float64: [0, 1e-300, 1e-18, 1e-14, 1e-12, 1e-9, 1e-5, 1],
}


class Gated(nn.Module):
    def __init__(self, path, layer):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.path, self.layer = path, nn.LayerNorm(WIDTH) if layer else nn.Identity()

    def forward(self, x, a, b):
        h = torch.tanh(self.first(x))
        z = self.layer(torch.tanh(self.middle(h)))
        return self.path(self, h, z, a, b)


@given(
    path=st.sampled_from(sorted(PATHS)),
    layer=st.booleans(),
    dtype=st.sampled_from(sorted(SIZES, key=str)),
    steps=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=2, max_size=6),
)
@settings(max_examples=160)
def test_right_or_refused(path, layer, dtype, steps):
    torch.manual_seed(0)
    net = Gated(PATHS[path], layer).to(dtype)
    model = engm.GradNormModule(net)
    for gates in steps:
        a, b = (torch.tensor(SIZES[dtype][gate], dtype=dtype) for gate in gates)
        x = torch.randn(N, 3, dtype=dtype)
        exact = copy.deepcopy(net).double()
        losses = exact(x.double(), a.double(), b.double()).square().sum(1)
        wanted = per_example_gradients(losses, trained(exact)).norms
        try:
            found = engm.per_example_grad_norms(model, model(x, a, b).square().sum(1))
        except RefusedError:
            assert not path.startswith("independent")
            continue
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4 if dtype == torch.float32 else 1e-8, atol=0)


def test_a_plan_is_not_kept_from_before():
    """Shares of 1e-30 are nothing beside a row's own, and all of it at the next step."""
    torch.manual_seed(0)
    net = Gated(PATHS["reversed and shifted"], False)
    model = engm.GradNormModule(net)
    for size in (1e-30, 1.0):
        losses = model(torch.randn(N, 3), torch.tensor(size), torch.tensor(0.0)).square().sum(1)
        if size == 1:
            with pytest.raises(RefusedError, match="influences the losses of other examples"):
                engm.per_example_grad_norms(model, losses)
        else:
            engm.per_example_grad_norms(model, losses)


def test_elements_too_small_to_tell_of_a_row_that_is_not():
    """Two branches are equal but for rounding; the one with the other example's row has a factor of 1e-36."""
    torch.manual_seed(0)
    model = engm.GradNormModule(Gated(PATHS["the larger one"], True))
    x = torch.randn(N, 3)
    with suppress(RefusedError):
        engm.per_example_grad_norms(model, model(x, torch.tensor(1e-36), torch.tensor(1e-8)).square().sum(1))
    with pytest.raises(RefusedError, match="influences the losses of other examples"):
        engm.per_example_grad_norms(model, model(x, torch.tensor(1.0), torch.tensor(1e-30)).square().sum(1))
