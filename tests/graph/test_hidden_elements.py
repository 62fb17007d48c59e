"""Elements of a row that get no gradient for now may be other examples' than the one that the row seems to be of.

At the first steps one example alone has a loss behind a branch, or each has one element of a square; later on others
have too.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import per_example_gradients, relative, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

import engm
from engm.checks import RefusedError

N = 4
EYE, FULL = torch.eye(N).double(), torch.ones(N, N).double()
THIRD, TWO, ALL = (torch.tensor(numbers).double() for numbers in ([0, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]))


class Beside(nn.Module):
    """A branch in which the examples lie in an order of its own, and a layer on them as usual."""

    def __init__(self, branch, beside=True, **parts):
        super().__init__()
        self.branch, self.layer = branch, nn.Linear(5, 1) if beside else None
        for name, part in parts.items():
            setattr(self, name, part)
        self.double()

    def forward(self, x, mask):
        found = self.branch(self, x, mask)
        return found if self.layer is None else found + self.layer(x)[:, 0]


class BothWays(torch.autograd.Function):
    """A product, and its transpose."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        product = x @ weight.t()
        return product, product.t().clone()

    @staticmethod
    def backward(ctx, gradient, turned):
        x, _ = ctx.saved_tensors
        return None, gradient.t() @ x + turned @ x


def both_ways(net, x, mask):
    product, turned = BothWays.apply(x, net.weight)
    return product.tanh().sum(1) + turned.square().sum(0) * mask


BRANCHES = {
    "features in front": (
        lambda s, x, m: ((s.weight @ x.t() + s.bias).tanh() * m).sum(0),
        {"weight": (7, 5), "bias": (7, 1)},
    ),
    "hinge": (lambda s, x, m: F.relu(s.weight @ x.t() + 100 * m - 50).sum(0), {"weight": (7, 5)}),
    "packed tokens": (lambda s, x, m: (s.conv(x.t()[None]).tanh()[0] * m).sum(0), {"conv": lambda: nn.Conv1d(5, 6, 1)}),
    "tiled images": (
        lambda s, x, m: (s.conv(x.reshape(1, 1, 1, -1)).tanh()[0, :, 0] * m).sum(0),
        {"conv": lambda: nn.Conv2d(1, 6, (1, 5), stride=(1, 5))},
    ),
    "classes in front": (
        lambda s, x, m: (s.table[:, torch.arange(N)].tanh() * m).sum(0),
        {"table": (7, 9)},
    ),
    "one row alone": (lambda s, x, m: (s.weight @ x.t())[0].tanh() * m, {"weight": (3, 5)}),
    "scale of a time": (
        lambda s, x, m: ((x[:, :3].t() - 1).square() * s.scale.exp() * m).sum(0),
        {"scale": (3, 1)},
    ),
    "function of the user's": (both_ways, {"weight": (6, 5)}),
    "checkpoint": (
        lambda s, x, m: (
            checkpoint(lambda t: (s.weight @ t.t()).tanh(), x.clone().requires_grad_(), use_reentrant=False) * m
        ).sum(0),
        {"weight": (7, 5)},
    ),
    "group norm": (lambda s, x, m: (s.norm(x.t()[None])[0].tanh() * m).sum(0), {"norm": lambda: nn.GroupNorm(1, 5)}),
    "recurrence": (
        lambda s, x, m: s.rnn(x[None])[0][0].sum(1) * m,
        {"rnn": lambda: nn.GRU(5, 3, batch_first=True)},
    ),
    "softmax over the batch": (lambda s, x, m: ((s.weight @ x.t()).softmax(1) * m).sum(0), {"weight": (7, 5)}),
}

READERS = {
    "sum": lambda h, m: (h * m).sum(0),
    "einsum": lambda h, m: torch.einsum("ji,ji->i", h, m),
    "logsumexp": lambda h, m: h.masked_fill(m == 0, -float("inf")).logsumexp(0),
    "relu": lambda h, m: F.relu(h + 100 * m - 50).sum(0),
    "amax": lambda h, m: (h + (100 * m if m.sum() == N else 0)).amax(0),
    "aminmax": lambda h, m: torch.aminmax(h + (100 * m if m.sum() == N else 0), dim=0).max,
    "norm": lambda h, m: (h * m).norm(dim=0),
    "std": lambda h, m: (h * m).std(0),
    "prod": lambda h, m: (h * m + 1).prod(0),
    "cumsum": lambda h, m: (h * m).cumsum(0)[-1],
    "smooth": lambda h, m: F.smooth_l1_loss(h * m, torch.zeros_like(h), reduction="none").sum(0),
}


PICKS = {
    "topk": lambda h: h.topk(1, 0)[0][0],
    "max": lambda h: h.max(0)[0],
    "min": lambda h: h.min(0)[0],
    "median": lambda h: h.median(0)[0],
    "kthvalue": lambda h: h.kthvalue(2, 0)[0],
    "gather": lambda h: h.gather(0, h.argmax(0, keepdim=True))[0],
    "take": lambda h: torch.take_along_dim(h, h.argmax(0, keepdim=True), 0)[0],
    "index": lambda h: h[h.argmax(0), torch.arange(N)],
    "sort": lambda h: h.sort(0)[0][-1],
    "norm": lambda h: h.norm(dim=0),
    "roll": lambda h: h.roll(1, 1).roll(-1, 1).t().tanh().sum(1),
    "least": lambda h: torch.minimum(h, h.detach().mean()).t().tanh().sum(1),
}

GATES = {
    "where": lambda h, m: torch.where(m > 0, h, torch.zeros(())),
    "factor": lambda h, m: h * m,
    "hinge": lambda h, m: torch.minimum(h.clamp(-40, 40), 100 * m - 50),
}

LABELS = torch.full((N, N), float("nan")).double().fill_diagonal_(0.0)
CLOSED = torch.full((N, N), -1e4).double().fill_diagonal_(0.0)
NONE = torch.zeros(N, N).double()
TO_ONE = torch.zeros(N, N, dtype=torch.long)

# Readers of features in front, [features, n], of which numbers close all elements but one of every row.
CHOOSING = {
    "nansum": (lambda h, y: (h + y).nansum(0), LABELS),
    "nanmean": (lambda h, y: (h + y).nanmean(0), LABELS),
    "glu": (lambda h, y: F.glu(torch.cat([h, y], 0), 0).sum(0), CLOSED),
    "amax": (lambda h, y: (h + y).amax(0), CLOSED),
    "scatter_reduce": (
        lambda h, y: NONE[:1].scatter_reduce(0, TO_ONE, h + y, "amax", include_self=False)[0],
        CLOSED,
    ),
    "index_reduce": (
        lambda h, y: NONE[:1].index_reduce(0, TO_ONE[0], h + y, "amax", include_self=False)[0],
        CLOSED,
    ),
    "segment_reduce": (lambda h, y: torch.segment_reduce(h + y, "max", lengths=torch.tensor([N]), axis=0)[0], CLOSED),
    "max_pool": (
        lambda h, y: F.max_pool2d((h + y)[None, None], (N, 1))[0, 0, 0],
        CLOSED,
    ),
}


def right_or_refused(net, masks, **options):
    """Steps with other masks; how many were refused."""
    model, refused = engm.GradNormModule(net, **options), 0
    for mask in masks:
        x = torch.randn(N, 5, dtype=torch.float64)
        with model.paused():
            truth = per_example_gradients(model(x, mask), trained(net))
        try:
            norms = engm.per_example_grad_norms(model, model(x, mask))
        except RefusedError:
            refused += 1
        else:
            assert relative(norms, truth.norms) < 1e-9
    return refused


@pytest.mark.parametrize("coupled", ["refuse", "exact"])
@pytest.mark.parametrize("name", BRANCHES)
def test_examples_along_the_elements_of_a_row(name, coupled):
    torch.manual_seed(0)
    branch, parts = BRANCHES[name]
    made = {key: nn.Parameter(torch.randn(p)) if isinstance(p, tuple) else p() for key, p in parts.items()}
    refused = right_or_refused(Beside(branch, **made), [THIRD, THIRD, TWO, ALL], coupled=coupled)
    assert refused <= (2 if name in ("recurrence", "softmax over the batch") and coupled == "refuse" else 0)


@pytest.mark.parametrize("name", READERS)
def test_one_element_of_every_row(name):
    """Rows that all examples read are a coupling, which shows at a later step."""
    torch.manual_seed(0)
    net = Beside(lambda s, x, m: READERS[name](s.rows(x), m), beside=False, rows=nn.Linear(5, N))
    assert right_or_refused(net, [EYE, EYE]) == 0
    assert right_or_refused(net, [EYE, EYE, FULL]) <= 1


def test_members_of_an_ensemble_that_see_a_part_of_the_batch():
    torch.manual_seed(0)
    net = Beside(
        lambda s, x, m: ((s.weight @ x.t() + s.bias).square() * m).sum(0),
        weight=nn.Parameter(torch.randn(N, 5)),
        bias=nn.Parameter(torch.randn(N, 1)),
    )
    assert right_or_refused(net, [EYE, EYE, ((torch.rand(N, N) < 0.6) + EYE).clamp(max=1).double()]) == 0


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("pick", PICKS)
@given(seed=st.integers(0, 2**20))
@settings(max_examples=4)
def test_elements_that_a_gate_closes_and_a_pick_may_choose(pick, gate, seed):
    """Features in front, of which one is picked for every example, behind a gate that is another at each step."""
    torch.manual_seed(seed)
    net = Beside(
        lambda s, x, m: PICKS[pick](GATES[gate](x[:, :3].t() * s.scale, m)).tanh() * s.size,
        scale=nn.Parameter(torch.randn(3, 1)),
        size=nn.Parameter(torch.randn(())),
    )
    draws = torch.Generator().manual_seed(seed)
    masks = [F.one_hot(torch.randint(N, (), generator=draws), N) for _ in range(3)]
    masks += [torch.randint(2, (N,), generator=draws) for _ in range(4)]
    assert right_or_refused(net, [mask.double() for mask in masks]) == 0


@pytest.mark.parametrize("name", CHOOSING)
def test_numbers_close_all_but_one_element_of_a_row(name):
    torch.manual_seed(0)
    reader, closing = CHOOSING[name]
    net = Beside(lambda s, x, y: reader((s.weight @ x.t()).tanh(), y), weight=nn.Parameter(torch.randn(N, 5)))
    assert right_or_refused(net, [closing, closing, NONE, NONE]) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("small", [1e-12, 1e-9, 1e-6])
@pytest.mark.parametrize("first", [1, N])
def test_a_share_within_a_row_that_dwarfs_all_others(dtype, small, first):
    """The gradient of zeros, whose length is bounded, is so many times as large as that of others in the same rows."""
    torch.manual_seed(0)
    weight, size = nn.Parameter(torch.randn(3, 5, dtype=dtype)), nn.Parameter(torch.randn(3, dtype=dtype))

    class Lengths(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.size = weight, size

        def forward(self, x, mask):
            h = self.weight @ x.t()
            h = h / h.norm(dim=0, keepdim=True).clamp_min(small)
            return (h.t().tanh() * self.size).sum(1) * mask

    model = engm.GradNormModule(net := Lengths())
    for step in range(6):
        x, mask = torch.randn(N, 5, dtype=dtype), torch.ones(N, dtype=dtype)
        if step < 3:
            mask[first:] = 0
            mask = mask.roll(step)
        else:
            x[step % N] = 0
        with model.paused():
            truth = per_example_gradients(model(x, mask), trained(net))
        norms = engm.per_example_grad_norms(model, model(x, mask))
        assert float((norms - truth.norms).abs().max() / truth.norms.max()) < (1e-9 if dtype == torch.float64 else 1e-4)
