"""Influences that are too small to show beside a row's own gradient, and grow: the norms are right, or refused.

Rows of other examples come by a gate that is open, nearly closed or closed, one gate a path.
"""

import copy

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


PATHS = {
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
@settings(max_examples=80)
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
            assert path != "independent"
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
