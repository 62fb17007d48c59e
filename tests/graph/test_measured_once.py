"""Networks that move no rows by data are measured at the first step alone, in whatever order the examples lie."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import per_example_gradients, random_losses, relative, tensor, trained
from torch import Tensor, nn

import engm
from engm.backward import prepare
from engm.rules import pulled_back


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


class Normalised(Between):
    def between(self, h):
        rows = h.reshape(-1, 4)
        return (rows - rows.logsumexp(-1)[:, None]).view(h.shape)


class Gated(Between):
    def between(self, h):
        return nn.functional.glu(h.reshape(-1, 4).repeat(1, 2), 1).view(h.shape)


class PooledChannelsLast(Between):
    """Pooling images to one pixel hands on memory of other strides, by ``as_strided``."""

    def between(self, h):
        images = h.reshape(-1, 3, 2, 2).to(memory_format=torch.channels_last)
        return h + nn.functional.adaptive_avg_pool2d(images, 1).flatten(1).unsqueeze(2)


@pytest.fixture
def plans(monkeypatch):
    made, original = [], prepare.make_plan
    monkeypatch.setattr(prepare, "make_plan", lambda *args: made.append(1) or original(*args))
    return made


KINDS = [
    StacksOfParameters,
    SharedOnTheRight,
    Fourier,
    ComplexNumbers,
    InOrderOfTime,
    Normalised,
    Gated,
    PooledChannelsLast,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 5])
def test_measured_once(kind, n, plans):
    torch.manual_seed(0)
    net = kind().double()
    model = engm.GradNormModule(net)
    for _ in range(3):
        losses = random_losses(model(torch.randn(n, 3, 4, dtype=torch.float64)))
        truth = per_example_gradients(losses, trained(net))
        assert relative(engm.per_example_grad_norms(model, losses), truth.norms) < 1e-9
    assert len(plans) == 1


class Tokens(nn.Module):
    """A language model with layers on tokens that were laid out one behind the other, by example or by time."""

    def __init__(self, by_time):
        super().__init__()
        self.words, self.mixed, self.last = nn.Embedding(9, 4), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 9)
        self.by_time = by_time

    def forward(self, words):
        h, (n, length) = self.mixed(self.words(words))[0], words.shape
        if self.by_time:
            return self.last(h.transpose(0, 1).reshape(-1, 4)).view(length, n, 9).transpose(0, 1)
        return self.last(h.reshape(-1, 4)).view(n, length, 9)


@pytest.mark.parametrize("by_time", [False, True])
@pytest.mark.parametrize("n", [3, 8])
def test_tokens_that_are_masked_otherwise_at_every_step(by_time, n, plans):
    torch.manual_seed(0)
    net = Tokens(by_time).double()
    model = engm.GradNormModule(net)
    for _ in range(14):
        outputs = model(torch.randint(9, (n, 10))).square().sum(2)
        losses = (outputs * (torch.rand(n, 10) < 0.3)).sum(1)
        truth = per_example_gradients(losses, trained(net))
        before = len(plans)
        assert relative(engm.per_example_grad_norms(model, losses), truth.norms) < 1e-9
    assert len(plans) == before


class Gates(nn.Module):
    """Two branches, each of which passes no gradient on where its gate is closed."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6)) for _ in range(2))
        self.token, self.last = nn.Parameter(tensor(6)), nn.Linear(6, 3)

    def forward(self, x, gates):
        found = zip(self.branches, gates, strict=True)
        return self.last(sum(gate * torch.relu(branch(x) * self.token) for branch, gate in found))


def test_branches_that_are_closed_by_turns(plans):
    torch.manual_seed(0)
    net = Gates().double()
    model = engm.GradNormModule(net)
    for gates in ((1, 0), (0, 1), (1, 0), (1, 1), (0, 0), (0, 1)):
        losses = random_losses(model(torch.randn(4, 4, dtype=torch.float64), torch.tensor(gates)))
        truth = per_example_gradients(losses, trained(net))
        assert relative(engm.per_example_grad_norms(model, losses), truth.norms) < 1e-9
    assert len(plans) == 2


class Penalised(nn.Module):
    """The penalty of a norm of the gradient of outputs with respect to inputs ``[n, 4]``."""

    def __init__(self, between):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.between = between

    def forward(self, x):
        x = x.requires_grad_()
        found = self.last(torch.tanh(self.middle(self.between(self.first(x)))))
        (gradient,) = torch.autograd.grad(found.sum(), x, create_graph=True)
        return found.squeeze(1) + (gradient.norm(dim=1) - 1) ** 2


@pytest.mark.parametrize(
    "between",
    [
        *(F.elu, F.gelu, F.hardswish, F.hardtanh, F.hardshrink, F.leaky_relu, F.logsigmoid, F.mish, F.relu, F.sigmoid),
        *(F.silu, F.softplus, F.softshrink, torch.tanh),
        lambda h: h.softmax(1) + h.log_softmax(1),
        lambda h: F.layer_norm(h, (6,)),
        lambda h: F.glu(h.repeat(1, 2), 1),
    ],
)
def test_gradients_of_gradients(between, plans, monkeypatch):
    """Weights enter there as they are, or transposed twice, so that nothing is pulled back to them."""

    def refuse(*args):
        raise AssertionError("a gradient is pulled back to a parameter")

    monkeypatch.setattr(pulled_back, "pull_back", refuse)
    torch.manual_seed(0)
    net = Penalised(between).double()
    model = engm.GradNormModule(net)
    for _ in range(4):
        losses = model(2 * torch.randn(5, 4, dtype=torch.float64))
        truth = per_example_gradients(losses, trained(net))
        before = len(plans)
        assert relative(engm.per_example_grad_norms(model, losses), truth.norms) < 1e-9
    assert len(plans) == before


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), groups=2, bias=False),
        nn.Conv1d(4, 6, 3, stride=2),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.ConvTranspose1d(4, 6, 2),
    ],
)
def test_gradients_of_gradients_of_images(layer, plans):
    """The weight of a convolution enters its backward pass by a rule."""

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Conv2d(2, 4, 1), copy.deepcopy(layer), nn.Linear(6, 1)

        def forward(self, x):
            h = torch.tanh(self.first(x.requires_grad_()))
            h = self.middle(h if "2d" in type(layer).__name__ else h.flatten(2))
            found = self.last(torch.tanh(h).flatten(2).mean(2)).squeeze(1)
            (gradient,) = torch.autograd.grad(found.sum(), x, create_graph=True)
            return found + (gradient.flatten(1).norm(dim=1) - 1) ** 2

    torch.manual_seed(0)
    net = Critic().double()
    model = engm.GradNormModule(net)
    for _ in range(2):
        losses = model(torch.randn(3, 2, 5, 6, dtype=torch.float64))
        truth = per_example_gradients(losses, trained(net))
        assert relative(engm.per_example_grad_norms(model, losses), truth.norms) < 1e-9
    (kept,) = model.engm_plans.values()
    assert len(plans) == 1
    assert all(entry.ruled for entry in kept[0].entries)


class Neighbours(nn.Module):
    """Sums over neighbours beside the nodes themselves, in graphs of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.last = nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor, gates: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]))) * gates
        return x.new_zeros(3, 3).index_add(0, graph, self.last(x))


GRAPH = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
EDGES = torch.tensor([[0, 1, 1, 4, 3, 5, 6, 7], [1, 0, 2, 3, 4, 6, 5, 8]])  # none starts from the nodes 2 and 8


def right_of_graphs(model: engm.GradNormModule, gates: Tensor) -> None:
    losses = model(torch.randn(9, 4, dtype=torch.float64), EDGES, GRAPH, gates).square().sum(1)
    truth = per_example_gradients(losses, trained(model))
    assert relative(engm.per_example_grad_norms(model, losses), truth.norms) < 1e-9


def test_a_graph_in_which_no_edge_starts_from_some_nodes(plans):
    torch.manual_seed(0)
    model = engm.GradNormModule(Neighbours())
    for _ in range(4):
        right_of_graphs(model, torch.ones(9, 1).double())
    assert len(plans) == 1


def test_rows_whose_gates_change_at_every_step_are_told_in_the_end(plans):
    """What is kept for no more than a step is not kept again and again."""
    torch.manual_seed(0)
    model = engm.GradNormModule(Neighbours())
    for _ in range(30):
        right_of_graphs(model, (torch.rand(9, 1) < 0.5).double())
    assert len(plans) <= 12


class TwoReadersOfTokens(nn.Module):
    """A layer whose weight is a new parameter at every step, as in DoRA, and which reads what another one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.low, self.high = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(2, 5)
        self.scale = nn.Parameter(torch.ones(5))
        self.register_buffer("weight", torch.randn(6, 5))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        plain = nn.functional.linear(nn.functional.dropout(h, 0.1), nn.Parameter(self.weight.T))
        return self.scale * plain + self.high(self.low(nn.functional.dropout(h, 0.1)))


def test_tokens_without_a_loss_behind_a_weight_that_is_made_anew(plans):
    torch.manual_seed(0)
    model = engm.GradNormModule(TwoReadersOfTokens())
    for _ in range(4):
        losses = model(torch.randn(3, 5, 4, dtype=torch.float64))[:, :-1].square().sum((1, 2))
        truth = per_example_gradients(losses, trained(model))
        assert relative(engm.per_example_grad_norms(model, losses), truth.norms) < 1e-9
    assert len(plans) == 1
