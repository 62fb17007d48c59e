"""Embeddings and bags of them against the oracle: every option, sparse gradients, tables shared with a projection."""

import copy

import pytest
import torch
from engine_checks import TOLERANCE, assert_measured, check
from hypothesis import given
from hypothesis import strategies as st
from oracle import dtype_of, random_losses, tensor, truth
from torch import nn

import engm
from engm.rules import embedding

dtypes = st.sampled_from([torch.float64, torch.float32])


def indices(*shape, size, seed=0):
    return torch.randint(size, shape, generator=torch.Generator().manual_seed(seed))


def losses_of(x, seed=0):
    return lambda net: random_losses(net(x), seed)


@given(
    n=st.integers(1, 5),
    positions=st.lists(st.integers(1, 5), max_size=2),
    size=st.integers(1, 7),
    d=st.integers(1, 6),
    padding=st.sampled_from([None, 0, -1]),
    by_frequency=st.booleans(),
    max_norm=st.sampled_from([None, 0.7]),
    int32=st.booleans(),
    dtype=dtypes,
    seed=st.integers(0, 99),
)
def test_any_shape_and_option(n, positions, size, d, padding, by_frequency, max_norm, int32, dtype, seed):
    torch.manual_seed(seed)
    layer = nn.Embedding(size, d, padding_idx=padding, scale_grad_by_freq=by_frequency, max_norm=max_norm)
    x = indices(n, *positions, size=size, seed=seed)
    check(nn.Sequential(layer, nn.Tanh(), nn.Linear(d, 3)).to(dtype), losses_of(x.int() if int32 else x, seed))


def test_padding_alone_has_no_gradient():
    net = nn.Sequential(nn.Embedding(4, 3, padding_idx=2)).double()
    x = torch.tensor([[2, 2], [1, 2]])
    norms = check(net, losses_of(x)).norms
    assert norms[0] == 0
    assert norms[1] > 0


def test_keyword_argument_and_subclass():
    class Mine(nn.Embedding):
        pass

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = Mine(5, 3)

        def forward(self, x):
            return self.table(input=x)

    check(Net().double(), losses_of(indices(3, 4, size=5)))


@pytest.mark.parametrize("by_frequency", [False, True])
def test_two_views_of_an_example(by_frequency):
    net = nn.Sequential(nn.Embedding(5, 3, scale_grad_by_freq=by_frequency), nn.Tanh()).double()
    x = indices(6, 4, size=5)

    def losses(m):
        first, second = m(x).chunk(2)
        return random_losses(first) + (first * second).flatten(1).sum(1)

    check(net, losses, views=2)


class TwoTables(nn.Module):
    """One table read by two embeddings, which may disagree about padding, at two lengths."""

    def __init__(self, first, second):
        super().__init__()
        self.a, self.b = nn.Embedding(6, 4, **first), nn.Embedding(6, 4, **second)
        self.b.weight = self.a.weight

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x[:, :2]).tanh(), self.a(x[:, 1:2]).sin()], 1)


@pytest.mark.parametrize("second", [{}, {"padding_idx": 1}, {"padding_idx": 3}, {"scale_grad_by_freq": True}])
def test_two_embeddings_share_a_table(second):
    check(TwoTables({"padding_idx": 1}, second).double(), losses_of(indices(4, 5, size=6)))


class LanguageModel(nn.Module):
    """One matrix in and out, with look-ups of two kinds and a bias that is not shared."""

    def __init__(self, size, d, padding=None, sparse=False, uses=1):
        super().__init__()
        self.table = nn.Embedding(size, d, padding_idx=padding, sparse=sparse)
        self.body, self.out = nn.Linear(d, d), nn.Linear(d, size)
        self.out.weight = self.table.weight
        self.uses = uses

    def forward(self, x):
        h = torch.tanh(self.body(self.table(x)))
        if self.uses == 2:
            h = torch.cat([h, self.table(x.flip(1)) * h], 1)
            return torch.cat([self.out(h), self.out(h[:, :1]).sin()], 1)
        return self.out(h)


@given(
    n=st.integers(1, 4),
    positions=st.integers(1, 6),
    size=st.integers(2, 40),
    d=st.integers(1, 5),
    padding=st.sampled_from([None, 1]),
    uses=st.integers(1, 2),
    dtype=dtypes,
    seed=st.integers(0, 99),
)
def test_table_tied_to_the_output(n, positions, size, d, padding, uses, dtype, seed):
    """The sizes lie on both sides of the choice between the table's gradient and the products of positions."""
    torch.manual_seed(seed)
    net = LanguageModel(size, d, padding, uses=uses).to(dtype)
    check(net, losses_of(indices(n, positions, size=size, seed=seed), seed))


def test_the_cross_term_of_a_tied_table_matters():
    """Without it this model's norm would be far off, so that the test above can fail."""
    torch.manual_seed(0)
    net = LanguageModel(30, 4).double()
    measured = check(net, losses_of(indices(4, 3, size=30)))
    apart = copy.deepcopy(net)
    apart.out.weight = nn.Parameter(net.table.weight.detach().clone())
    alone = truth(apart, losses_of(indices(4, 3, size=30))).squared_norms
    added = (alone["table.weight"] + alone["out.weight"]).sqrt()
    tied = measured.squared_norms["table.weight"].sqrt()
    assert float((added / tied - 1).abs().min()) > 1e-3


# -- sparse gradients ------------------------------------------------------------------------------------------------


def without_sparse(net):
    twin = copy.deepcopy(net)
    for module in twin.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False
    return twin


@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("inner", [torch.optim.SparseAdam, torch.optim.SGD])
def test_sparse_gradient(padding, inner):
    net = nn.Sequential(nn.Embedding(6, 4, padding_idx=padding, sparse=True), nn.Tanh()).double()
    x = indices(4, 3, size=6)
    expected = truth(without_sparse(net), losses_of(x))
    model = engm.GradNormModule(net)
    losses = losses_of(x)(model)
    assert_measured(engm.measure(model, losses), expected)
    alpha = float(expected.norms.median())
    opt = engm.ENGM(model, inner(model.parameters(), lr=0.1), alpha=alpha)
    opt.zero_grad()
    opt.backward(losses)
    gradient = net[0].weight.grad
    assert gradient.is_sparse
    wanted = expected.update((alpha / expected.norms).clamp(max=1))["0.weight"]
    assert float((gradient.to_dense() - wanted).norm() / wanted.norm()) <= TOLERANCE["gradient, float64"]
    opt.backward(losses_of(x)(model))  # a second micro-batch is added
    assert net[0].weight.grad.is_sparse
    assert float((net[0].weight.grad.to_dense() - 2 * wanted).norm() / wanted.norm()) <= 1e-8
    before = net[0].weight.detach().clone()
    opt.step()
    assert not torch.equal(net[0].weight, before)


@pytest.mark.parametrize("first", ["sparse", "dense"])
def test_sparse_and_dense_gradients_add_up(first):
    """As with autograd, a dense gradient added to a sparse one makes a dense one."""
    table = nn.Embedding(6, 4, sparse=True).double()
    reader, head = nn.Sequential(table), nn.Linear(4, 6, bias=False).double()
    head.weight = table.weight
    x, y = indices(3, 2, size=6), tensor(3, 4)

    def step(net, losses):
        model = engm.GradNormModule(net)
        engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=1e9).backward(losses(model))

    parts = [
        lambda: step(reader, lambda m: random_losses(m(x))),
        lambda: step(nn.Sequential(head), lambda m: random_losses(m(y))),
    ]
    for part in parts if first == "sparse" else reversed(parts):
        part()
    got = table.weight.grad
    table.weight.grad = None
    (random_losses(reader(x)).mean() + random_losses(head(y)).mean()).backward()
    assert not got.is_sparse
    torch.testing.assert_close(got, table.weight.grad)


def test_sparse_table_tied_to_the_output_has_a_dense_gradient():
    net = LanguageModel(7, 3, sparse=True).double()
    x = indices(4, 3, size=7)
    expected = truth(without_sparse(net), losses_of(x))
    model = engm.GradNormModule(net)
    losses = losses_of(x)(model)
    assert_measured(engm.measure(model, losses), expected)
    engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=1e9).backward(losses)
    wanted = expected.update(torch.ones(4, dtype=torch.float64))
    assert not net.table.weight.grad.is_sparse
    torch.testing.assert_close(net.table.weight.grad, wanted["table.weight"])


# -- bags ------------------------------------------------------------------------------------------------------------


class Bag(nn.Module):
    """A bag with its arguments, and something behind it."""

    def __init__(self, bag, keywords=False):
        super().__init__()
        self.bag, self.head, self.keywords = bag, nn.Linear(bag.embedding_dim, 3), keywords

    def forward(self, x, offsets=None, weights=None):
        weights = None if weights is None else weights.to(dtype_of(self))
        if self.keywords:
            out = self.bag(input=x, offsets=offsets, per_sample_weights=weights)
        else:
            out = self.bag(x, offsets, weights)
        return self.head(torch.tanh(out))


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    mode=st.sampled_from(["sum", "mean", "max"]),
    layout=st.sampled_from(["2-D", "offsets", "last offset"]),
    padding=st.sampled_from([None, 1]),
    extra=st.sampled_from(["", "weights", "trained weights", "frequency", "max_norm"]),
    keywords=st.booleans(),
    dtype=dtypes,
    seed=st.integers(0, 99),
)
def test_bags_of_any_kind(lengths, mode, layout, padding, extra, keywords, dtype, seed):
    torch.manual_seed(seed)
    size, n = 5, len(lengths)
    weighted = "weights" in extra and mode == "sum"
    options = {"max_norm": 0.7 if extra == "max_norm" else None}
    options["scale_grad_by_freq"] = extra == "frequency" and mode != "max"
    bag = nn.EmbeddingBag(
        size, 4, mode=mode, padding_idx=padding, include_last_offset=layout == "last offset", **options
    )
    if layout == "2-D":
        x, offsets = indices(n, max(1, lengths[0]), size=size, seed=seed), None
    else:
        x = indices(sum(lengths), size=size, seed=seed)
        ends = torch.tensor(lengths).cumsum(0)
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), ends if layout == "last offset" else ends[:-1]])
    weights = None
    if weighted:
        weights = tensor(*x.shape, seed=seed).requires_grad_(extra == "trained weights")
    check(Bag(bag, keywords).to(dtype), lambda net: random_losses(net(x, offsets, weights), seed))


def test_equal_rows_share_no_maximum():
    """Of equal maxima the first counts, as in the layer: both rows of the table are the same here."""
    bag = nn.EmbeddingBag(3, 4, mode="max")
    with torch.no_grad():
        bag.weight[1] = bag.weight[0]
    check(Bag(bag).double(), losses_of(torch.tensor([[1, 0, 1], [0, 1, 2]])))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_two_views_of_bags(mode):
    x = indices(6, 3, size=5)

    def losses(m):
        first, second = m(x).chunk(2)
        return random_losses(first) + (first * second).flatten(1).sum(1)

    check(Bag(nn.EmbeddingBag(5, 4, mode=mode)).double(), losses, views=2)


def test_bag_with_a_sparse_gradient():
    net = Bag(nn.EmbeddingBag(6, 4, mode="mean", padding_idx=2, sparse=True)).double()
    x = indices(4, 3, size=6)
    expected = truth(without_sparse(net), losses_of(x))
    model = engm.GradNormModule(net)
    losses = losses_of(x)(model)
    assert_measured(engm.measure(model, losses), expected)
    engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=1e9).backward(losses)
    assert net.bag.weight.grad.is_sparse
    wanted = expected.update(torch.ones(4, dtype=torch.float64))["bag.weight"]
    torch.testing.assert_close(net.bag.weight.grad.to_dense(), wanted)


@pytest.mark.parametrize("offsets", [True, False])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_of_nothing_whose_gradient_is_not_finite(mode, offsets):
    """As that of the length of a zero vector. No row was read, and autograd drops it."""
    torch.manual_seed(0)
    net = nn.EmbeddingBag(7, 5, mode=mode, padding_idx=6).double()
    source = torch.randint(0, 6, (9,)) if offsets else torch.randint(0, 6, (4, 3))
    given = (source, torch.tensor([0, 3, 3, 5])) if offsets else (source.index_fill(0, torch.tensor([1]), 6),)
    model = engm.GradNormModule(net)
    lengths = net(*given).square().sum(1).sqrt()
    wanted = torch.stack([torch.autograd.grad(one, net.weight, retain_graph=True)[0].norm() for one in lengths])
    assert wanted[1] == 0
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.1), 1.0)
    stats = opt.backward(model(*given).square().sum(1).sqrt())
    torch.testing.assert_close(stats.norms, wanted)
    assert net.weight.grad.isfinite().all()


@pytest.mark.parametrize(("by_frequency", "sparse"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(("mode", "weighted"), [("sum", True), ("sum", False), ("mean", False)])
def test_bags_of_very_different_lengths(mode, weighted, by_frequency, sparse, monkeypatch):
    """They are not laid side by side, each as long as the longest, which would take n times as much memory."""
    torch.manual_seed(0)
    monkeypatch.setattr(embedding, "_padded", None)
    options = {"padding_idx": 2, "scale_grad_by_freq": by_frequency, "sparse": sparse, "mode": mode}
    net = nn.EmbeddingBag(9, 4, **options).double()
    model = engm.GradNormModule(net)
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.1), 1.0)
    for step in range(3):
        lengths = torch.tensor([1, 0, 40, 2, 3, 0, 1, 5])[torch.randperm(8)]
        source = torch.randint(9, (int(lengths.sum()),))
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)[:-1]])
        weights = torch.rand(len(source)).double() if weighted else None
        of = torch.randint(3, (8,)) if step == 2 else torch.arange(8)  # which example has which bags

        def losses(module, of=of, given=(source, offsets, weights)):
            each = torch.tanh(module(*given)).sum(1).square() + module(*given).sum(1)
            return each.new_zeros(int(of.max()) + 1).index_add(0, of, each)

        grads = [torch.autograd.grad(one, net.weight, retain_graph=True)[0].to_dense() for one in losses(net)]
        wanted = torch.stack(grads)
        opt.zero_grad()
        stats = opt.backward(losses(model))
        torch.testing.assert_close(stats.norms, wanted.flatten(1).norm(dim=1), rtol=1e-9, atol=1e-12)
        mean = torch.tensordot(stats.weights, wanted, 1) / len(wanted)
        torch.testing.assert_close(net.weight.grad.to_dense(), mean, rtol=1e-9, atol=1e-12)
