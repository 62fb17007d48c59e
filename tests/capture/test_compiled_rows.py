"""Rows inside of regions made by torch.compile: moved by data, mixed from some step on, reached from some step on.

Every norm that is handed out is held against one backpropagation per example of the same network, uncompiled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled import BACKEND
from oracle import relative, tensor, truth
from torch import Tensor, nn

import engm
from engm.graph.plan import PlannedGraph

pytestmark = [pytest.mark.usefixtures("nothing_compiled"), pytest.mark.torch_insides]

Between = Callable[[Tensor, Tensor], Tensor]
N = 4
ORDERS = ([0, 1, 2, 3], [1, 0, 3, 2], [3, 2, 1, 0], [0, 1, 2, 3], [2, 0, 3, 1], [1, 2, 3, 0])


class Net(nn.Module):
    """Two layers, and between them a function of the rows and of something that changes from step to step."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(3, 4), nn.Linear(4, 4), between

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        return self.second(self.between(torch.tanh(self.first(x)), data)).square().sum(1)


def made(between: Between, where: str) -> tuple[nn.Module, engm.GradNormModule]:
    """A network, and the same one wrapped, with the whole network compiled or what is between the layers."""
    torch.manual_seed(0)
    plain = Net(between).double()
    net = copy.deepcopy(plain)
    if where == "whole":
        net.compile(backend=BACKEND)
    else:
        net.between = torch.compile(between, backend=BACKEND)
    return plain, engm.GradNormModule(net, strict=False)


def assert_right(plain: nn.Module, model: engm.GradNormModule, *inputs: Tensor) -> None:
    expected = truth(plain, lambda net: net(*inputs)).norms
    assert relative(engm.per_example_grad_norms(model, model(*inputs)), expected) <= 1e-9


def plans_of(model: engm.GradNormModule) -> list[bool]:
    """A list to which every graph of the model adds whether it had to be measured."""
    measured: list[bool] = []

    def look(graph: PlannedGraph, _: Any) -> None:
        measured.append(graph.fresh or graph.plan.told is not None)

    model.engm_observer = look
    return measured


# -- moved by data -------------------------------------------------------------------------------------------------

MOVING: dict[str, Between] = {
    "index": lambda h, p: h[p],
    "narrow index": lambda h, p: torch.embedding(h, p.int()),
    "sorted by floats": lambda h, p: h[(1.5 * p).sort().indices],
    "gathered": lambda h, p: h.gather(0, p[:, None].expand(-1, 4)),
    "mask": lambda h, p: torch.where(p[:1] > 1, h, h.flip(0)),
    "factors": lambda h, p: F.one_hot(p, N).double() @ h,
}


@pytest.mark.parametrize("where", ["whole", "between"])
@pytest.mark.parametrize("name", MOVING)
def test_rows_that_the_data_move(name, where):
    plain, model = made(MOVING[name], where)
    for number, order in enumerate(ORDERS):
        assert_right(plain, model, tensor(N, 3, seed=number), torch.tensor(order))


class Graphs(nn.Module):
    """Nodes of several graphs, whose messages go along edges; as many nodes and edges in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.message, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, edges: Tensor, of: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        h = h + torch.zeros_like(h).index_add(0, edges[0], torch.relu(self.message(h[edges[1]])))
        return self.out(h.new_zeros(3, 4).index_add(0, of, h)).square().sum(1)


def test_graphs_of_many_sizes():
    torch.manual_seed(0)
    plain = Graphs().double()
    net = copy.deepcopy(plain)
    net.compile(backend=BACKEND)
    model = engm.GradNormModule(net)
    for number, sizes in enumerate(([2, 2, 2], [2, 2, 2], [1, 2, 3], [3, 2, 1], [1, 1, 4])):
        of = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
        edges = torch.stack(torch.where(of[:, None] == of[None]))[:, :10]
        assert_right(plain, model, tensor(6, 3, seed=number), edges, of)


def test_input_gradients_of_moved_rows():
    plain, model = made(MOVING["index"], "whole")
    for number, order in enumerate(ORDERS):
        x, p = tensor(N, 3, seed=number).requires_grad_(), torch.tensor(order)
        losses = plain(x, p)
        (expected,) = torch.autograd.grad(losses.sum(), x)
        expected = expected[p]  # whose row it is
        found = engm.measure(model, model(x, p), inputs=x)
        assert relative(found.input_norms, expected.norm(dim=1)) <= 1e-9


# -- mixed from some step on ---------------------------------------------------------------------------------------

MIXING: dict[str, Between] = {
    "mean": lambda h, gate: torch.sin(h + gate * h.mean(0)),
    "hinge": lambda h, gate: torch.sin(h) + torch.relu(h.roll(1, 0) - 10 + 20 * gate),
    "clipped": lambda h, gate: h / torch.clamp(h.norm() * gate, min=1.0),
    "maximum": lambda h, gate: h * torch.where(gate > 0, h.amax(0), torch.ones_like(h[0])),
}


@pytest.mark.parametrize("where", ["whole", "between"])
@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("before", [2, 5])
def test_an_influence_that_begins(name, where, before):
    """At the third step, and at a later one, when rows are told in the norm pass."""
    plain, model = made(MIXING[name], where)
    for number in range(before):
        assert_right(plain, model, tensor(N, 3, seed=number), torch.tensor(0.0))
    losses = model(tensor(N, 3, seed=9), torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"the output of layer 'first' \(Linear\) for some examples influences"):
        engm.per_example_grad_norms(model, losses)
    assert_right(plain, model, tensor(N, 3, seed=10), torch.tensor(0.0))


@pytest.mark.parametrize("coupled", ["refuse", "exact"])
def test_what_is_said_of_an_influence_between_layers(coupled):
    """Nobody sees into the region, so it has to be taken apart for the influence to be computed."""
    net = Net(torch.compile(lambda h, _: h - h.mean(0), backend=BACKEND)).double()
    model = engm.GradNormModule(net, coupled=coupled)
    losses = model(tensor(N, 3), torch.zeros(()))
    message = r"influences.*CompiledFunctionBackward, a region made by torch\.compile: leave what mixes them uncompiled"
    with pytest.raises(RuntimeError, match=message):
        engm.per_example_grad_norms(model, losses)


# -- reached from some step on -------------------------------------------------------------------------------------


class Gated(nn.Module):
    """A branch with a layer behind a gate."""

    def __init__(self, moves: bool) -> None:
        super().__init__()
        self.a, self.branch, self.out, self.moves = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2), moves

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        h = h[x[:, 0].argsort()] if self.moves else h
        return self.out(h + gate * torch.sin(self.branch(h))).square().sum(1)


@pytest.mark.parametrize("moves", [False, True])
def test_a_gate_that_opens(moves):
    """The layer behind it had no gradient when the graph was measured, and nobody sees that from outside."""
    torch.manual_seed(0)
    plain = Gated(moves).double()
    net = copy.deepcopy(plain)
    net.compile(backend=BACKEND)
    model = engm.GradNormModule(net, strict=False)
    for number, gate in enumerate((0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 2.0)):
        assert_right(plain, model, tensor(N, 3, seed=number), torch.tensor(gate))


# -- where the code tells ------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """A block with causal attention on what a convolution makes of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(2, 8, 2, stride=2), nn.GroupNorm(2, 8)
        self.before, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.max_pool2d(F.pad(F.softplus(self.norm(self.patches(x))), (1, 0)), 1).flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.qkv(self.before(h)).chunk(3, 2))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return F.cross_entropy(
            self.head(torch.cat([h[:, :1], h[:, 1:].mean(1, keepdim=True)], 1).sum(1)), y, reduction="none"
        )


def test_rows_that_the_code_tells_are_not_measured_again():
    torch.manual_seed(0)
    plain = Transformer().double()
    net = copy.deepcopy(plain)
    net.compile(backend=BACKEND)
    model = engm.GradNormModule(net)
    measured = plans_of(model)
    for number, n in enumerate((3, 3, 3, 5, 5, 6, 6)):  # from the second size on sizes are symbols in the code
        x, y = tensor(n, 2, 4, 4, seed=number), torch.arange(n) % 3
        assert_right(plain, model, x, y)
    assert measured == [True, False, False, True, False, True, False]


@pytest.mark.parametrize(
    ("between", "settles"),
    [(lambda h, p: F.gelu(h) * p[:, None], True), (lambda h, p: h[p], False)],
    ids=["elementwise", "index"],
)
def test_what_lies_between_layers(between, settles):
    plain, model = made(between, "between")
    measured = plans_of(model)
    for number, order in enumerate(ORDERS):
        assert_right(plain, model, tensor(N, 3, seed=number), torch.tensor(order))
    assert measured == [True] + [not settles] * (len(ORDERS) - 1)


def test_a_compiled_loss():
    torch.manual_seed(0)
    plain = nn.Linear(3, 4).double()
    model = engm.GradNormModule(copy.deepcopy(plain))
    measured = plans_of(model)

    def losses_of(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, reduction="none", label_smoothing=0.1)

    compiled = torch.compile(losses_of, backend=BACKEND)
    for number in range(3):
        x, y = tensor(N, 3, seed=number), torch.randint(4, (N,))
        expected = truth(plain, lambda net, x=x, y=y: losses_of(net(x), y)).norms
        assert relative(engm.per_example_grad_norms(model, compiled(model(x), y)), expected) <= 1e-9
    assert measured == [True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("settles", [True, False])
def test_inductor(settles):
    """Time first, or rows that are sorted by data and put back."""
    torch.manual_seed(0)
    plain = Sorted(not settles).double()
    model = engm.GradNormModule(copy.deepcopy(plain))
    model.compile(fullgraph=True)
    measured = plans_of(model)
    for number in range(6):
        assert_right(plain, model, tensor(5, N, 3, seed=number))
    assert measured == [True] + [not settles] * 5


class Sorted(nn.Module):
    """Layers on sequences, time first, whose examples may be put in an order by the data."""

    def __init__(self, sorts: bool) -> None:
        super().__init__()
        self.net, self.sorts = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)), sorts

    def forward(self, x: Tensor) -> Tensor:
        order = x[0, :, 0].argsort() if self.sorts else torch.arange(x.shape[1])
        return (
            self.net(x[:, order] if self.sorts else x)
            .square()
            .sum((0, 2))[order.argsort() if self.sorts else slice(None)]
        )


@pytest.mark.parametrize("called", ["unwrapped", "copy"])
def test_calls_outside_of_captured_passes(called):
    """What is compiled there has no taps, and is never taken in a captured pass."""
    plain, model = made(lambda h, data: h * data[:, None], "whole")
    other = model.unwrap()
    if called == "copy":
        other = copy.deepcopy(plain)
        other.compile(backend=BACKEND)
    for number in range(3):
        inputs = tensor(N, 3, seed=number), torch.ones(N)
        assert_right(plain, model, *inputs)
        other(*inputs).sum().backward()
        with torch.no_grad():
            other(*inputs)
