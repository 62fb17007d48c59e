"""Parts of a graph that no gradient came to at one step, and of which it must not be forgotten that nobody saw them.

Every step is held against one backpropagation an example: the losses are independent unless a test says otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import per_example_gradients, random_losses, relative, tensor, trained
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import engm
from engm.backward import prepare
from engm.checks import RefusedError
from engm.graph.planning import make_plan

pytestmark = [pytest.mark.torch_insides, pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")]


def assert_right(model: engm.GradNormModule, losses: Callable[[], Tensor]) -> None:
    """Norms of all parameters, and the gradient of the reweighted losses, as one backpropagation an example gives."""
    parameters = trained(model)
    truth = per_example_gradients(losses(), parameters)
    assert relative(engm.per_example_grad_norms(model, losses()), truth.norms) <= 1e-9
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.0), 0.5)
    update = truth.update(opt.backward(losses()).weights)
    for name, parameter in parameters.items():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, update[name], rtol=1e-9, atol=1e-12)
    opt.zero_grad()


# -- rows that are moved --------------------------------------------------------------------------------------------

MOVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda h, order: h[order],
    "index select": lambda h, order: h.index_select(0, order),
    "gather": lambda h, order: h.gather(0, order[:, None].expand(-1, h.shape[1])),
    "embedding": lambda h, order: F.embedding(order, h),
    "index put": lambda h, order: torch.zeros_like(h).index_put((order,), h),
    "index copy": lambda h, order: torch.zeros_like(h).index_copy(0, order, h),
    "scatter": lambda h, order: torch.zeros_like(h).scatter(0, order[:, None].expand(-1, h.shape[1]), h),
    "unbind": lambda h, order: torch.stack([h.unbind(0)[k] for k in order.tolist()]),
    "split": lambda h, order: torch.cat([h.split(1)[k] for k in order.tolist()]),
    "transpose": lambda h, order: h.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1),
    "slices": lambda h, order: torch.cat([h[k : k + 1] for k in order.tolist()]),
    "written": lambda h, order: _written(h, order),
    "twice": lambda h, order: h[order][order.flip(0)],
    "beside itself": lambda h, order: h.index_select(0, order) + h.index_select(0, order).tanh(),
    "tokens": lambda h, order: h.unflatten(1, (2, -1))[order].transpose(1, 2).flatten(1),
    "index add": lambda h, order: torch.zeros_like(h).index_add(0, order, h),
    "scatter add": lambda h, order: torch.zeros_like(h).scatter_add(0, order[:, None].expand_as(h), h),
    "scatter reduce": lambda h, order: torch.zeros_like(h).scatter_reduce(0, order[:, None].expand_as(h), h, "sum"),
    "scatter to means": lambda h, order: torch.ones_like(h).scatter_reduce(0, order[:, None].expand_as(h), h, "mean"),
    "index reduce": lambda h, order: torch.zeros_like(h).index_reduce(0, order, h, "mean", include_self=False),
    "bags": lambda h, order: F.embedding_bag(order[:, None], h, mode="sum"),
    "means of bags": lambda h, order: F.embedding_bag(order[:, None].expand(-1, 3), h, mode="mean"),
    "a sparse matrix": lambda h, order: torch.sparse.mm(torch.eye(len(h), dtype=h.dtype)[order].to_sparse(), h),
    "in a checkpoint": lambda h, order: checkpoint(MOVES["scatter to means"], h, order, use_reentrant=False),
}


def _written(h: Tensor, order: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    for place, k in enumerate(order.tolist()):
        out[place] = h[k]
    return out


@given(
    name=st.sampled_from(sorted(MOVES)),
    n=st.sampled_from([4, 6]),
    swaps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=2),
    masks=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3),
    early=st.booleans(),
)
def test_rows_that_are_moved(name, n, swaps, masks, early):
    """A move that is the same at every step, in front of it a mask that is not: at first it hides what is moved."""
    order = torch.arange(n)
    for one, other in swaps:
        order[[one % n, other % n]] = order[[other % n, one % n]]
    assert_moved_right(name, n, order, masks, early)


@pytest.mark.parametrize("name", MOVES)
def test_every_move(name):
    assert_moved_right(name, 4, torch.tensor([0, 1, 3, 2]), [[True, True, False, False], [True] * 4], early=False)


def assert_moved_right(name: str, n: int, order: Tensor, masks: list[list[bool]], early: bool) -> None:
    """Every step is right, of which the first shows the rows alone that stay where they are."""
    torch.manual_seed(0)
    masks = [(order == torch.arange(n)).tolist(), *masks]
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    model = engm.GradNormModule(net)
    for mask in masks:
        if not any(mask[:n]):
            continue
        x, shown = torch.randn(n, 4).double(), torch.tensor(mask[:n]).double().unsqueeze(1)

        def losses(x: Tensor = x, shown: Tensor = shown) -> Tensor:
            y = MOVES[name](model(x), order) * shown
            return (y.tanh() if early else y * torch.arange(1, 7)).square().sum(1)

        assert_right(model, losses)


SEGMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "segments": lambda h, lengths: torch.segment_reduce(h, "sum", lengths=lengths, axis=0),
    "means of segments": lambda h, lengths: torch.segment_reduce(h, "mean", lengths=lengths, axis=0),
    "scatter reduce": lambda h, lengths: _by_scatter(h, lengths, "sum"),
    "scatter to means": lambda h, lengths: _by_scatter(h, lengths, "mean"),
    "bags": lambda h, lengths: F.embedding_bag(torch.arange(len(h)), h, lengths.cumsum(0) - lengths, mode="mean"),
}


def _by_scatter(h: Tensor, lengths: Tensor, reduce: str) -> Tensor:
    index = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[:, None].expand_as(h)
    return h.new_zeros(len(lengths), h.shape[1]).scatter_reduce(0, index, h, reduce, include_self=False)


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("lengths", [(2, 2, 1, 3), (2, 2, 3, 1), (1, 3, 2, 2)], ids=str)
def test_sums_of_rows_of_examples_that_are_silent_at_first(name, lengths):
    """Two examples whose rows lie as if all had as many show nothing of the others: norms of parameters and inputs."""
    torch.manual_seed(0)
    model = engm.GradNormModule(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6)).double())
    for shown in ((1, 1, 0, 0), (1, 1, 0, 0), (1, 1, 1, 1)):
        x, mask = torch.randn(8, 4).double().requires_grad_(), torch.tensor(shown).double()

        def losses(x: Tensor = x, mask: Tensor = mask) -> Tensor:
            return SEGMENTS[name](model(x), torch.tensor(lengths)).square().sum(1) * mask

        assert_right(model, losses)
        truth = per_example_gradients(losses(), {"x": x}).norms
        found = engm.measure(model, losses(), inputs=x).input_norms
        assert relative(found, truth) <= 1e-9


def test_what_is_moved_as_it_seems_is_not_measured_again(monkeypatch):
    """A layout that moves rows of an example among themselves needs no watch: two plans at most, whatever is masked."""
    made = []
    monkeypatch.setattr(prepare, "make_plan", lambda *args: made.append(make_plan(*args)) or made[-1])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    model = engm.GradNormModule(net)
    for step in range(12):
        x, mask = torch.randn(5, 6, 4).double(), torch.rand(5, 6) < 0.5
        mask[0, 0] = mask[1, 0] = mask[2, 1] = mask[3, 1] = True
        y = model(x).transpose(1, 2).flip(2).roll(step // 6, 1).unflatten(1, (2, 3)).flatten(1, 2)
        engm.per_example_grad_norms(model, (y * mask.unsqueeze(1)).square().sum((1, 2)))
    assert len(made) <= 4


# -- branches ---------------------------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """A weight computed from two parameters and used twice; gates may close either parameter, and either use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.weights = nn.ParameterList([torch.randn(6, 6) for _ in range(2)])
        self.register_buffer("kept", (torch.rand(6, 6) > 0.3).double())
        self.double()

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        weight = sum(g * torch.tanh(w * self.kept) for g, w in zip(gate[:2], self.weights, strict=True))
        h = torch.tanh(self.first(x))
        return gate[2] * F.linear(h, weight) + gate[3] * torch.sin(h @ weight) + h


GATES = st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 4), min_size=3, max_size=8)


@given(gates=GATES)
def test_weights_of_which_one_branch_is_closed_at_a_time(gates):
    torch.manual_seed(0)
    model = engm.GradNormModule(Mixture())
    for gate in gates:
        x, given_gate = torch.randn(4, 4).double(), torch.tensor(gate).double()
        assert_right(model, lambda x=x, gate=given_gate: model(x, gate).square().sum(1))


class TwoReaders(nn.Module):
    """A tensor that is read as it is, and with its examples the other way round; three numbers open and close both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h * gates[0] + (h * gates[1]).flip(0) * gates[2])


@given(steps=st.lists(st.tuples(*[st.sampled_from([0.0, 1.0])] * 3), min_size=2, max_size=6))
def test_two_readers_of_which_one_is_closed_at_a_time(steps):
    """Where both are open the examples meet, and are refused; until then norms are right."""
    torch.manual_seed(0)
    model = engm.GradNormModule(TwoReaders())
    for gates in steps:
        x, given_gates = torch.randn(4, 4).double(), torch.tensor(gates).double()
        if all(gates):
            with pytest.raises(RefusedError, match="influences the losses of other examples"):
                engm.per_example_grad_norms(model, model(x, given_gates).square().sum(1))
        else:
            assert_right(model, lambda x=x, gates=given_gates: model(x, gates).square().sum(1))


class RowGates(nn.Module):
    """The same where gates are of rows, and a move that never changes leaves some of them where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor, order: Tensor, by_index: bool, gates: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        moved = h * gates[0]
        moved = moved[order] if by_index else torch.zeros_like(h).index_add(0, order, moved)
        return self.last(h * gates[1] + moved * gates[2])


@given(
    swap=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    by_index=st.booleans(),
    steps=st.lists(st.tuples(*[st.integers(0, 15)] * 3), min_size=2, max_size=5),
)
def test_two_readers_whose_rows_are_closed_one_by_one(swap, by_index, steps):
    """Right, or refused where some row comes to two losses."""
    torch.manual_seed(0)
    order = torch.arange(4)
    order[list(swap)] = order[list(reversed(swap))]
    model = engm.GradNormModule(RowGates())
    for bits in [(0, 0, 15), (8, 15, 12), *steps]:  # the first two hide the move from each other
        gates = torch.tensor([[(of >> row) & 1 for row in range(4)] for of in bits]).double().unsqueeze(2)
        x = torch.randn(4, 4).double().requires_grad_()

        def losses(x: Tensor = x, gates: Tensor = gates) -> Tensor:
            return model(x, order, by_index, gates).square().sum(1)

        reached = [torch.autograd.grad(loss, x, retain_graph=True)[0].abs().sum(1) > 0 for loss in losses()]
        try:
            assert_right(model, losses)
        except RefusedError:
            assert bool((torch.stack(reached).sum(0) > 1).any())


class TwoWays(nn.Module):
    """Rows in no regular order, each of which goes two ways: where it lies, and by pieces or an index elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor, order: Tensor, how: str, owners: Tensor, gates: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        moved = MOVES[how](h, order)
        rows = self.last(h * gates[0] + moved * gates[1]) * gates[2]
        return rows.new_zeros(int(owners.max()) + 1, 3).index_add(0, owners, rows)


@given(
    how=st.sampled_from(["slices", "index", "split", "index put", "scatter", "beside itself"]),
    swap=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    steps=st.lists(st.tuples(*[st.integers(0, 63)] * 3), min_size=1, max_size=5),
)
def test_two_ways_of_rows_in_no_regular_order(how, swap, steps):
    """Right, or refused where some row comes to two losses."""
    torch.manual_seed(0)
    owners, order = torch.tensor([0, 1, 1, 2, 0, 1]), torch.arange(6)
    order[list(swap)] = order[list(reversed(swap))]
    model = engm.GradNormModule(TwoWays())
    here = sum(1 << row for row in range(6) if order[row] == row)
    one, other = here | 1 << swap[0], here | 1 << swap[1]
    for bits in [(63, here, 63), (here, 63, 63), (one, other, 63), (other, one, 63), *steps]:
        gates = torch.tensor([[(of >> row) & 1 for row in range(6)] for of in bits]).double().unsqueeze(2)
        x = torch.randn(6, 4).double().requires_grad_()

        def losses(x: Tensor = x, gates: Tensor = gates) -> Tensor:
            return model(x, order, how, owners, gates).square().sum(1)

        reached = [torch.autograd.grad(loss, x, retain_graph=True)[0].abs().sum(1) > 0 for loss in losses()]
        try:
            assert_right(model, losses)
        except RefusedError:
            assert bool((torch.stack(reached).sum(0) > 1).any())


def test_two_ways_that_two_graphs_have_shown_one_by_one():
    """That a row is one example's by one way and another's by the other is not to be forgotten when both are open."""
    torch.manual_seed(0)
    owners, order = torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 1, 6, 3, 4, 5, 2])
    model = engm.GradNormModule(TwoWays())
    for bits in [
        ("1101100", "1111111", "1110110"),
        ("0011110", "1101111", "1110110"),
        ("0011110", "1101110", "1111111"),
        ("1101111", "1101110", "1111111"),
    ]:
        gates = torch.tensor([[float(bit) for bit in of] for of in bits]).double().unsqueeze(2)
        x = torch.randn(7, 4).double()
        assert_right(model, lambda x=x, gates=gates: model(x, order, "slices", owners, gates).square().sum(1))


# -- masks in front of indices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("put", [False, True])
def test_a_mask_of_two_dimensions_in_front_of_an_index(put):
    torch.manual_seed(0)
    n, mask = 4, torch.ones(2, 3, dtype=torch.bool)
    model = engm.GradNormModule(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double())
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [1, 0, 3, 2]):
        x, index = torch.randn(2, 3, n, 4).double(), torch.tensor(order)[:, None]

        def losses(x: Tensor = x, index: Tensor = index) -> Tensor:
            y = model(x)
            if not put:
                y = y[mask, index]
            else:
                z = torch.zeros_like(y)
                z[mask, index] = y.flatten(0, 1).transpose(0, 1)
                y = z.permute(2, 0, 1, 3).flatten(1, 2)
            return (y * torch.arange(1, 19).view(6, 3)).square().sum((1, 2))

        assert_right(model, losses)


# -- the watch within what is pulled back -----------------------------------------------------------------------------


class Centred(nn.Module):
    """Examples that meet in a mean, behind rows that masks show and hide."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor, one: Tensor, other: Tensor, third: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = (torch.stack([h, h.flip(0)]) * torch.stack([one, 1 - one])).sum(0)
        out = torch.zeros_like(h)
        out[:2], out[2:] = h[:2], h[2:] * other[2:]
        h = torch.relu(out[torch.tensor([1, 0, 2, 3])] + 4 * third - 2)
        return self.last(h - h.mean(0))


@pytest.mark.parametrize("seed", range(8))
def test_rows_that_are_watched_where_all_losses_are_pulled_back(seed):
    torch.manual_seed(seed)
    model = engm.GradNormModule(Centred(), coupled="exact")
    for _ in range(3):
        x, masks = torch.randn(4, 4).double(), (torch.rand(3, 4, 1) < 0.5).double()
        assert_right(model, lambda x=x, masks=masks: model(x, *masks).square().sum(1).view(2, 2).sum(1))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_a_weight_closed_behind_the_one_reader_that_is_open(order):
    """Each of two readers was seen open, but the second while the weight itself was closed to the parameter."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
            self.weight, self.mask = nn.Parameter(torch.randn(5, 5)), torch.rand(5, 5, dtype=torch.float64)

        def forward(self, x, first, second, inner):
            h = torch.tanh(self.layer(x))
            weight = torch.softmax(torch.tanh(self.weight * self.mask) * inner, 1)
            return self.last(torch.tanh(h @ weight) * first + torch.sin(h @ weight.t()) * second + h)

    torch.manual_seed(0)
    model = engm.GradNormModule(Network().double())
    gates = [(0.0, 0.0, 1.0), (1.0, 0.0, 1.0), (0.0, 1.0, 0.0)]
    for seed, open_ones in enumerate([*(gates[place] for place in order), (1.0, 1.0, 1.0), (0.0, 1.0, 1.0)]):
        losses = random_losses(model(tensor(2, 3, 4, seed=seed), *open_ones).flatten(1))
        expected = per_example_gradients(losses, trained(model)).norms
        torch.testing.assert_close(engm.per_example_grad_norms(model, losses), expected, rtol=1e-9, atol=0)
