"""Networks whose rows are moved otherwise at every step: whose they are is told by the norm pass itself, and right."""

import pytest
import torch
from oracle import per_example_gradients, random_losses, relative, tensor, trained
from torch import nn

import engm
from engm.backward import prepare

pytestmark = pytest.mark.torch_insides

STEPS = 9


class Moved(nn.Module):
    """Rows in an order of the data, with layers and parameters of every kind in between."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.conv, self.rnn = nn.Conv1d(2, 2, 3, padding=1), nn.GRU(6, 6, batch_first=True)
        self.gain, self.token = nn.Parameter(tensor(6)), nn.Parameter(tensor(6))

    def forward(self, x, order, gone):
        h = self.norm(self.first(x[order])) * self.gain
        h = h.masked_scatter(gone[..., None], self.token.expand(int(gone.sum()), -1))
        h = torch.tanh(self.rnn(self.conv(h))[0])
        return self.last(h[order.argsort()].mean(1))


class Graphs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, edges, graph, n):
        for layer in (self.first, self.second):
            x = layer(x)
            x = torch.tanh(x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]))
        return self.last(x.new_zeros(n, 6).index_add(0, graph, x))


def of_moved(model, n):
    return random_losses(model(torch.randn(n, 2, 4, dtype=torch.float64), torch.randperm(n), torch.rand(n, 2) < 0.3))


def of_graphs(model, n):
    sizes = torch.randint(1, 6, (n,))
    graph, starts = torch.repeat_interleave(torch.arange(n), sizes), sizes.cumsum(0) - sizes
    parts = [torch.randint(0, k, (2, 2 * k)) + s for k, s in zip(sizes.tolist(), starts.tolist(), strict=True)]
    return random_losses(model(torch.randn(len(graph), 4, dtype=torch.float64), torch.cat(parts, 1), graph, n))


@pytest.fixture
def plans(monkeypatch):
    made, original = [], prepare.make_plan
    monkeypatch.setattr(prepare, "make_plan", lambda *args: made.append(1) or original(*args))
    return made


@pytest.mark.parametrize("n", [2, 7, 70])
@pytest.mark.parametrize(("network", "losses_of"), [(Moved, of_moved), (Graphs, of_graphs)])
def test_right_at_every_step(network, losses_of, n, plans):
    torch.manual_seed(0)
    net = network().double()
    model = engm.GradNormModule(net)
    counts = []
    for _ in range(STEPS):
        losses = losses_of(model, n)
        expected = per_example_gradients(losses, trained(net))
        alpha = float(expected.norms.median())
        opt = engm.ENGM(model, torch.optim.SGD(net.parameters(), 0.1), alpha)
        opt.zero_grad()
        before = len(plans)
        assert relative(opt.backward(losses).norms, expected.norms) <= 1e-9
        wanted = expected.update((alpha / expected.norms).clamp(max=1))
        for name, parameter in net.named_parameters():
            assert relative(parameter.grad, wanted[name]) <= 1e-9
        counts.append(len(plans) - before)
    if n > 2:  # of two examples half the orders are the usual one
        assert sum(counts[-3:]) == 0, "the rows are told, not measured"


def test_examples_that_meet_later_on(plans):
    """What the norm pass cannot tell is measured from the beginning, and refused there."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.share = nn.Linear(4, 6), nn.Linear(6, 3), 0.0

        def forward(self, x, order):
            h = torch.tanh(self.first(x[order]))
            return self.last(h[order.argsort()] + self.share * h)

    net = Net().double()
    model = engm.GradNormModule(net)
    for step in range(STEPS):
        losses = random_losses(model(tensor(8, 4), torch.randperm(8, generator=torch.Generator().manual_seed(step))))
        engm.measure(model, losses)
    before = len(plans)
    net.share = 0.5
    losses = random_losses(model(tensor(8, 4), torch.randperm(8, generator=torch.Generator().manual_seed(99))))
    with pytest.raises(RuntimeError, match="influences the losses of other examples"):
        engm.measure(model, losses)
    assert len(plans) > before


def test_a_settled_order_is_kept_again(plans):
    net = Moved().double()
    model = engm.GradNormModule(net)
    for _ in range(STEPS):
        engm.measure(model, of_moved(model, 6))
    x, order, gone = torch.randn(6, 2, 4, dtype=torch.float64), torch.randperm(6), torch.rand(6, 2) < 0.5
    for _ in range(3):
        losses = random_losses(model(x, order, gone))
        norms = engm.measure(model, losses).norms
        assert relative(norms, engm.naive_grad_norms(model, losses)) <= 1e-9


class Placed(nn.Module):
    """Images at placeholders among words: some examples have several of them, others none.

    Each patch is a mean of its own, of which the first alone is read. Nobody watches where an operator that reduces
    what it scatters would pass on the gradient of the other: plans of images in no regular order hold for one graph.
    """

    def __init__(self):
        super().__init__()
        self.words, self.images, self.last = nn.Linear(4, 6), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x, mask, images):
        h = self.words(x).clone()
        patches = torch.tanh(self.images(images))
        own = torch.arange(2)[:, None].expand_as(patches)
        apart = torch.zeros_like(patches).scatter_reduce(1, own, patches, "mean", include_self=False)
        h[mask] = apart[:, 0] + patches.mean(1)
        return self.last(torch.tanh(h).mean(1))


def test_batches_for_which_a_plan_holds_in_between_do_not_have_the_others_measured_for_good(plans):
    torch.manual_seed(0)
    net = Placed().double()
    model = engm.GradNormModule(net)
    counts = []
    for step in range(12):
        numbers = torch.ones(3, dtype=torch.long) if step % 3 == 0 else torch.tensor([2, 0, 1])[torch.randperm(3)]
        losses = random_losses(model(tensor(3, 4, 4), torch.arange(4) < numbers[:, None], tensor(3, 2, 5)))
        expected = per_example_gradients(losses, trained(net)).norms
        plans.clear()
        assert relative(engm.per_example_grad_norms(model, losses), expected) <= 1e-9
        counts.append(len(plans))
    assert sum(counts[-6:]) == 0, counts
