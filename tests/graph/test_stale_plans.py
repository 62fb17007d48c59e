"""Steps of one structure whose rows belong to other examples than at the step before: no plan of the last step is used.

Each case stands for a way by which the values of a step, and no shape, tell whose a row is. ``steps`` are the data of
the steps in turn. All examples are independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from oracle import per_example_gradients, random_losses, tensor, trained
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import engm
from engm.graph.routing import signature_of, skeleton_of
from engm.graph.trace import trace

pytestmark = pytest.mark.torch_insides

ORDERS = ((0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2))
CASES: dict[str, tuple[Callable[..., Tensor], Sequence[object]]] = {}


class Net(nn.Module):
    """Two layers, and what lies between."""

    def __init__(self, between: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.between = between
        self.double()

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        return self.last(self.between(torch.tanh(self.first(x)), values))


def case(*steps: object) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def add(between: Callable[..., Tensor]) -> Callable[..., Tensor]:
        CASES[between.__name__] = between, steps
        return between

    return add


def matrix(order: Tensor) -> Tensor:
    return torch.eye(len(order), dtype=torch.float64)[order]


@case(*ORDERS)
def rows_of_an_embedding(h: Tensor, order: Tensor) -> Tensor:
    return F.embedding(order, h)


@case(*ORDERS)
def sparse_product(h: Tensor, order: Tensor) -> Tensor:
    return torch.sparse.mm(matrix(order).to_sparse(), h)


@case(*ORDERS)
def products_with_vectors(h: Tensor, order: Tensor) -> Tensor:
    return torch.stack([matrix(order) @ column for column in h.unbind(1)], 1)


@case(*ORDERS)
def solution_of_equations(h: Tensor, order: Tensor) -> Tensor:
    return torch.linalg.solve(matrix(order), h)


class Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, by):
        ctx.save_for_backward(by)
        return by @ h

    @staticmethod
    def backward(ctx, gradient):
        return ctx.saved_tensors[0].T @ gradient, None


@case(*ORDERS)
def function_of_the_users(h: Tensor, order: Tensor) -> Tensor:
    return Moved.apply(h, matrix(order))


@case(*ORDERS)
def inside_of_a_checkpoint(h: Tensor, order: Tensor) -> Tensor:
    return checkpoint(lambda rows: torch.sin(rows[order]), h, use_reentrant=False)


@case(*ORDERS)
def written_into_a_view(h: Tensor, order: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out.view(2, 2, 8).view(4, 8)[order] = h
    return out


@case(*ORDERS)
def written_row_by_row(h: Tensor, order: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    for source, row in enumerate(order.tolist()):
        out[row] = h[source]
    return out


@case((2, 2, 0, 0), (1, 1, 1, 1), (0, 1, 2, 1))
def nested_and_padded(h: Tensor, lengths: Tensor) -> Tensor:
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return torch.nested.nested_tensor_from_jagged(h, offsets=offsets).to_padded_tensor(0.0, (4, 2, 8)).sum(1)


@case((1, 1, 0, 1), (0, 1, 1, 1), (1, 0, 1, 1))
def picked_by_a_mask_of_two_dimensions(h: Tensor, mask: Tensor) -> Tensor:
    return h.view(1, 4, 8)[mask.bool().view(1, 4)]


@case((1, 0, 0, 1), (0, 1, 1, 0), (1, 1, 1, 1), (0, 0, 0, 0))
def swapped_where_a_mask_says(h: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[:, None] > 0, h, h.flip(0))


@case((1, 1, 0, 0), (0, 0, 1, 1), (1, 1, 0, 0))
def kept_apart_by_products(h: Tensor, mask: Tensor) -> Tensor:
    return h * mask[:, None] + h.flip(0) * mask[:, None]


@case((1, 1, 0, 0, 1, 1, 0, 0), (0, 0, 1, 1, 0, 0, 1, 1), (1, 1, 1, 1, 0, 0, 0, 0))
def kept_apart_in_a_stack(h: Tensor, mask: Tensor) -> Tensor:
    return (torch.cat([h, h.flip(0)]) * mask[:, None]).view(2, 4, 8).sum(0)


@case(*ORDERS)
def an_order_times_a_stack(h: Tensor, order: Tensor) -> Tensor:
    return torch.bmm(matrix(order)[None], h[None])[0]


@case(*ORDERS)
def a_stack_times_an_order(h: Tensor, order: Tensor) -> Tensor:
    return torch.bmm(h.T[None], matrix(order)[None])[0].T


@case((1, 0, 0, 0), (0, 1, 0, 0), (0, 1, 1, 1))
def one_example_with_a_gradient(h: Tensor, mask: Tensor) -> Tensor:
    return h.view(1, 4, 8).transpose(0, 1).sum(1) * mask[:, None]


@case((1, 1, 1, 1), (0, 1, 2, 3), (3, 3, 0, 1))
def all_rows_of_one_example(h: Tensor, owner: Tensor) -> Tensor:
    return torch.zeros_like(h).index_add(0, owner, h)


@case(((1, 0),) * 4, ((0, 1),) * 4, ((1, 0),) * 4)
def windows_of_rows(h: Tensor, weights: Tensor) -> Tensor:
    return (F.pad(h, (0, 0, 0, 1)).unfold(0, 2, 1) * weights[:, None]).sum(2)


@case(((1, 0),) * 4, ((0, 1),) * 4, ((1, 0),) * 4)
def strided_rows(h: Tensor, weights: Tensor) -> Tensor:
    return (F.pad(h, (0, 0, 0, 1)).as_strided((4, 2, 8), (8, 8, 1)) * weights[:, :, None]).sum(1)


@case(0, 2, 1, 0)
def between_constants_of_any_length(h: Tensor, at: Tensor) -> Tensor:
    return torch.cat([h.new_zeros(int(at), 8), h[:2], h.new_zeros(2 - int(at), 8)])


@case(0, 2, 1, 0)
def behind_a_constant_of_any_length(h: Tensor, at: Tensor) -> Tensor:
    return torch.cat([h.new_zeros(int(at), 8), h[: 4 - int(at)]])


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda h: h[None].expand(2, 4, 8),
    "repeated": lambda h: h.repeat(2, 1, 1),
    "stacked": lambda h: torch.stack([h, h]),
    "repeated one by one": lambda h: h.repeat_interleave(2, 0).view(4, 2, 8).transpose(0, 1),
    "added to": lambda h: h[None] + h.new_ones(2, 1, 8),
    "chosen": lambda h: torch.where(h.new_ones(2, 1, 1) > 0, h[None], 2 * h[None]),
    "indexed": lambda h: h[torch.arange(8) % 4].view(2, 4, 8),
    "gathered": lambda h: h.gather(0, (torch.arange(8) % 4)[:, None].expand(8, 8)).view(2, 4, 8),
    "embedded": lambda h: F.embedding(torch.arange(8) % 4, h).view(2, 4, 8),
    "added up along": lambda h: F.pad(h[None], (0, 0, 0, 0, 0, 1)).cumsum(0),
    "normalised along": lambda h: F.pad(h[None], (0, 0, 0, 0, 0, 1)).softmax(0),
    "transformed along": lambda h: torch.fft.fft(F.pad(h[None], (0, 0, 0, 0, 0, 1)), dim=0).real,
    "multiplied": lambda h: torch.einsum("a,nd->and", torch.tensor([1.0, 2.0], dtype=h.dtype), h),
    "multiplied within rows": lambda h: F.linear(h.T[..., None], h.new_ones(2, 1)).permute(2, 1, 0),
    "rows in two parts": lambda h: h.view(4, 2, 4).transpose(0, 1).repeat(1, 1, 2),
}


@pytest.mark.parametrize("name", sorted(COPIES))
def test_copies_that_are_read_by_turns(name):
    """The second copy of a row goes to another example than the first, and nothing is told of it at the first step."""
    masks = torch.tensor([[[1, 1, 1, 1], [0, 0, 0, 0]], [[0, 0, 0, 0], [1, 1, 1, 1]], [[1, 0, 1, 0], [0, 1, 0, 1]]])

    def between(h, mask):
        rows = (COPIES[name](h) * mask[:, :, None]).reshape(8, 8)
        return rows[torch.tensor([0, 1, 2, 3, 7, 6, 5, 4])].view(2, 4, 8).sum(0)

    def losses(model, step):
        return random_losses(model(torch.randn(4, 4, dtype=torch.float64), masks[(0, 1, 0, 2, 1)[step]]))

    torch.manual_seed(0)
    check(Net(between), losses, 5)


@pytest.mark.parametrize("by_time", [False, True])
def test_layers_on_rows_of_which_one_place_had_gradients(by_time):
    order = torch.tensor([0, 1, 2, 3, 7, 6, 5, 4] if by_time else [0, 7, 2, 5, 4, 3, 6, 1])
    masks = torch.tensor([[[1], [0]], [[0], [1]], [[1], [1]], [[1], [0]]]).expand(4, 2, 4)
    masks, shape = (masks, (2, 4)) if by_time else (masks.transpose(1, 2), (4, 2))
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def losses(model, step):
        rows = model(torch.randn(*shape, 4, dtype=torch.float64)) * masks[step][..., None]
        return random_losses(rows.reshape(8, 3)[order].view(*shape, 3).sum(0 if by_time else 1))

    check(net, losses, 4)


def test_images_of_which_the_first_or_the_second_half_has_gradients():
    """Half of the rows of a layer are not known then: all of an image at one step, a row of pixels at another."""

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(2, 3, 3)

        def forward(self, x, mask):
            rows = torch.tanh(self.layer(x)).flatten(1) * mask.repeat_interleave(4)[:, None]
            return rows[torch.tensor([0, 1, 2, 3, 7, 6, 5, 4])].view(2, 4, -1).sum(0)

    def losses(model, step):
        mask = torch.tensor(((1, 0), (0, 1))[step % 2])
        return random_losses(model(torch.randn(8, 2, 4, 4, dtype=torch.float64), mask))

    check(Halves().double(), losses, 4)


def test_rows_that_lie_as_two_layouts_say():
    """Rows 0 and 6 are of the examples 0 and 2, be there three rows an example or three steps of time."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def losses(model, step):
        mask = torch.zeros(12, dtype=torch.float64)
        mask[torch.tensor(([0, 6], [0, 6, 3, 9], [0, 6])[step])] = 1
        rows = model(torch.randn(12, 4, dtype=torch.float64)) * mask[:, None]
        return rows.view(3, 4, 3).square().sum((0, 2))

    check(net, losses, 3)


def check(net: nn.Module, losses: Callable[[nn.Module, int], Tensor], steps: int) -> None:
    model = engm.GradNormModule(net)
    for step in range(steps):
        torch.manual_seed(step)
        found = losses(model, step)
        truth = per_example_gradients(found, trained(net))
        norms = engm.per_example_grad_norms(model, found)
        assert float((norms - truth.norms).abs().max() / truth.norms.max()) < 1e-9, step


@pytest.mark.parametrize("name", sorted(CASES))
def test_other_values_make_another_plan(name):
    between, steps = CASES[name]

    def losses(model, step):
        values = torch.tensor(steps[step])
        return random_losses(model(torch.randn(4, 4, dtype=torch.float64), values))

    torch.manual_seed(0)
    check(Net(between), losses, len(steps))


def test_indices_that_are_written_over():
    buffer = torch.zeros(4, dtype=torch.long)

    def losses(model, step):
        buffer.copy_(torch.tensor(ORDERS[step]))
        return random_losses(model(torch.randn(4, 4, dtype=torch.float64), buffer))

    check(Net(lambda h, order: h[order]), losses, 3)


def test_packed_rows_of_which_one_example_had_gradients():
    def losses(model, step):
        mask = torch.tensor(((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))[step], dtype=torch.float64)
        return random_losses(model(torch.randn(1, 4, 4, dtype=torch.float64), mask))

    check(Net(lambda h, mask: h.view(2, 2, 8).sum(1) * mask[:, None]), losses, 3)


def test_time_steps_of_which_the_last_has_a_gradient():
    class Views(nn.Module):
        """Two views of every example, one behind the other along the second dimension."""

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x, mask):
            h = torch.tanh(self.first(x))  # [time, examples, 6]
            h = torch.tanh(self.last(torch.cat([h, h.flip(2)], 1)))
            return (h[-1].view(2, -1, 3) * mask).sum(0)

    def losses(model, step):
        mask = torch.eye(2, dtype=torch.float64) if step == 0 else torch.ones(2, 2, dtype=torch.float64)
        return random_losses(model(torch.randn(4, 2, 4, dtype=torch.float64), mask[..., None]))

    torch.manual_seed(0)
    check(Views().double(), losses, 2)


MASKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "by a factor": lambda h, mask: h * mask[:, None],
    "by a factor of copies": lambda h, mask: (h * mask[:, None].expand(2, 4, 1)).mean(0),
    "by a stack of products": lambda h, mask: (h[:, None] @ (mask[:, None, None] * torch.eye(8, dtype=h.dtype)))[:, 0],
    "by a sum": lambda h, mask: torch.einsum("nd,n->nd", h, mask),
}


@pytest.mark.parametrize("name", sorted(MASKED))
def test_rows_that_are_masked_and_then_moved(name):
    """Rows 2 and 3 have no gradient in the layer at first; they are the other's as soon as they have one."""
    masks = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]], dtype=torch.float64)

    def losses(model, step):
        return random_losses(model(torch.randn(4, 4, dtype=torch.float64), masks[step]))

    torch.manual_seed(0)
    check(Net(lambda h, mask: MASKED[name](h, mask)[torch.tensor([0, 1, 3, 2])]), losses, 3)


MEETING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "masked": lambda h, mask: h + mask[:, None] * h.flip(0),
    "masked, then moved": lambda h, mask: h + (mask[:, None] * h).flip(0),
    "filled, then moved": lambda h, mask: h + h.masked_fill(mask[:, None] == 0, 0).flip(0),
    "chosen, then moved": lambda h, mask: h + torch.where(mask[:, None] > 0, h.tanh(), 0)[[2, 1, 0]],
    "masked as steps of time": lambda h, mask: (
        (h := h[:, None] * h.new_ones(3, 1)) + (h * (mask[:, None, None] > 0).all()).transpose(0, 1)
    ).sum(1),
}


@pytest.mark.parametrize("name", sorted(MEETING))
@pytest.mark.parametrize("coupled", ["refuse", "exact"])
def test_a_mask_that_begins_to_couple(coupled, name):
    net = Net(MEETING[name])
    model = engm.GradNormModule(net, coupled=coupled)
    masks = ((0, 1, 0), (1, 1, 1), (0, 1, 0), (1, 1, 1)) if "time" in name else ((0, 1, 0), (1, 1, 0), (1, 1, 1))
    for mask in masks:
        losses = random_losses(model(torch.randn(3, 4, dtype=torch.float64), torch.tensor(mask)))
        if coupled == "refuse" and sum(mask) > 1:
            with pytest.raises(RuntimeError, match="influences the losses"):
                engm.per_example_grad_norms(model, losses)
            continue
        truth = per_example_gradients(losses, trained(net)).norms
        torch.testing.assert_close(engm.per_example_grad_norms(model, losses), truth)


HIGHEST: dict[str, Callable[[Tensor], Tensor]] = {
    "of a dimension": lambda h: h.amax(0).sum(),
    "of all": lambda h: h.max(),
    "as a norm": lambda h: torch.linalg.vector_norm(h, float("inf")),
}


@pytest.mark.parametrize("name", sorted(HIGHEST))
def test_a_maximum_that_comes_to_be_another_example_s(name):
    """The first loss takes a maximum over all examples, which is the first one's own at first."""

    class WithHighest(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8, bias=False), nn.Linear(8, 3)

        def forward(self, x):
            h = self.first(x).square()
            return self.last(1e-4 * h), HIGHEST[name](h)

    torch.manual_seed(0)
    net = WithHighest().double()
    model = engm.GradNormModule(net)
    for highest in (0, 0, 2):
        x = torch.randn(4, 4, dtype=torch.float64)
        x[highest] *= 1000
        out, most = model(x)
        losses = random_losses(out)
        losses = torch.cat([(losses[0] + most).unsqueeze(0), losses[1:]])
        if highest:
            with pytest.raises(RuntimeError, match="influences the losses"):
                engm.per_example_grad_norms(model, losses)
        else:
            truth = per_example_gradients(losses, trained(net)).norms
            torch.testing.assert_close(engm.per_example_grad_norms(model, losses), truth)


ROWS_OF_ONE = {
    "experts": lambda s, h, of: sum(
        torch.zeros_like(h).index_put((r := (of == e).nonzero()[:, 0],), h[r] @ s.stack[e]) for e in range(2)
    ),
    "segments": lambda s, h, of: h.new_zeros(4, 6).index_add(0, of[: len(of) - 1], h[: len(of) - 1] @ s.stack[0]),
    "a slice": lambda s, h, of: h + (h[: len(of)] @ s.stack[0]).sum(0),
}


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("name", ROWS_OF_ONE)
def test_another_number_of_rows_of_a_single_example(name, passes):
    """Nothing routes the rows of an example that is alone in a forward pass, and the graph is the same."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Parameter(torch.randn(2, 6, 6, dtype=torch.float64))

        def forward(self, x, of):
            return ROWS_OF_ONE[name](self, x[0], of).unsqueeze(0)

    torch.manual_seed(0)
    model = engm.GradNormModule(Network())
    for seed, of in enumerate([(0, 1, 1, 0), (0, 0, 0, 1), (1, 1, 1, 1), (0, 1, 0, 1), (1, 0), (1, 0, 0)]):
        y = [model(tensor(1, 4, 6, seed=10 * seed + one), torch.tensor(of)) for one in range(passes)]
        losses = torch.cat(y).square().flatten(1).sum(1)
        expected = per_example_gradients(losses, trained(model)).norms
        torch.testing.assert_close(engm.per_example_grad_norms(model, losses), expected, rtol=1e-9, atol=0)


def test_layers_called_on_single_vectors():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            return torch.stack([self.c(torch.tanh(self.b(self.a(row)))) for row in x])

    check(Loop().double(), lambda model, _: random_losses(model(torch.randn(3, 4, dtype=torch.float64))), 2)


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


@pytest.mark.parametrize("of", [lambda row: row, lambda row: row.sum()], ids=["vectors", "numbers"])
def test_functions_of_the_users_called_once_an_example(of):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh()).double()

    def losses(model, _):
        return torch.stack([Squared.apply(of(row)) for row in model(torch.randn(3, 4, dtype=torch.float64))])

    check(net, losses, 2)


CLOSED: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp": lambda number: number.clamp_min(0),
    "relu": torch.relu,
    "maximum": lambda number: torch.maximum(number, -number.square()),
    "where": lambda number: torch.where(number > 0, number, 0),
    "a factor": lambda number: number * (number > 0),
}


@pytest.mark.parametrize("name", CLOSED)
def test_numbers_of_one_example_that_a_bound_holds(name):
    """Tensors without a dimension, of which others read the same number, and the bound passes no gradient on."""

    class Numbers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            pairs = (self.layer(row).unbind() for row in x)
            return torch.stack([CLOSED[name](2 * one) + one * other for one, other in pairs])

    torch.manual_seed(0)
    check(Numbers().double(), lambda model, _: model(torch.randn(4, 3, dtype=torch.float64)), 3)


@pytest.mark.parametrize(
    "net",
    [
        nn.Linear(4, 3),
        nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)),
        nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.LayerNorm((2, 3)), nn.Flatten()),
    ],
    ids=["linear", "layer norm", "layer norm of two dimensions"],
)
def test_every_output_is_a_loss(net):
    net = net.double()
    model = engm.GradNormModule(net, coupled="exact")
    losses = model(torch.randn(2, 4, dtype=torch.float64)).square().flatten()
    truth = per_example_gradients(losses, trained(net)).norms
    torch.testing.assert_close(engm.per_example_grad_norms(model, losses), truth)


def test_rows_moved_inside_of_a_compiled_region():
    moved = torch.compile(lambda h, order: torch.sin(h[order]), backend="aot_eager")

    def losses(model, step):
        return random_losses(model(torch.randn(4, 4, dtype=torch.float64), torch.tensor(ORDERS[step])))

    check(Net(moved), losses, 3)


def test_a_function_of_the_users_that_moved_nothing_at_first():
    class MovedPlanes(Moved):
        @staticmethod
        def forward(ctx, h, by):
            ctx.save_for_backward(by)
            return torch.tensordot(by, h, 1)

        @staticmethod
        def backward(ctx, gradient):
            return torch.tensordot(ctx.saved_tensors[0].T, gradient, 1), None

    def losses(model, step):
        return random_losses(model(torch.randn(4, 2, 4, dtype=torch.float64), torch.tensor(ORDERS[step])))

    check(Net(lambda h, order: MovedPlanes.apply(h, matrix(order)).sum(1)), losses, 3)


class Order:
    """Keeps an order, which may be another at the next step."""

    rows: Tensor


KEPT: dict[str, Callable[[Tensor, Order], object]] = {
    "an array": lambda rows, order: rows.numpy(),
    "a tensor in a dictionary": lambda rows, order: {"rows": F.pad(rows, (600, 600))},  # of which not all is printed
    "a list of lists": lambda rows, order: [rows.tolist()],
    "an object": lambda rows, order: order,
    "a function": lambda rows, order: lambda: rows,
}


@pytest.mark.parametrize("what", sorted(KEPT))
def test_what_a_function_of_the_users_keeps(what):
    """The planes lie in the usual order at first."""
    order = Order()

    class MovedPlanes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            ctx.kept = KEPT[what](order.rows, order)
            return h[order.rows]

        @staticmethod
        def backward(ctx, gradient):
            kept = ctx.kept
            kept = kept() if callable(kept) else kept.rows if isinstance(kept, Order) else kept
            kept = kept["rows"][600:-600] if isinstance(kept, dict) else kept[0] if isinstance(kept, list) else kept
            return torch.zeros_like(gradient).index_copy(0, torch.as_tensor(kept), gradient)

    def losses(model, step):
        order.rows = torch.tensor(ORDERS[step])
        return random_losses(model(torch.randn(4, 2, 4, dtype=torch.float64), None))

    check(Net(lambda h, _: MovedPlanes.apply(h).sum(1)), losses, 3)


JAGGED: dict[str, Callable[[Tensor, nn.Parameter], Tensor]] = {
    "times": lambda h, gain: h * gain,
    "plus": lambda h, gain: torch.tanh(h + gain.view(1, 1, -1)),
    "attention": lambda h, gain: (
        F.scaled_dot_product_attention(*[h.unflatten(-1, (2, 4)).transpose(1, 2)] * 3).transpose(1, 2).flatten(-2)
    ),
}


@pytest.mark.parametrize("name", sorted(JAGGED))
def test_jagged_rows(name):
    """Sequences of other lengths at every step, as many rows in all, which meet parameters or one another."""

    class Jagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.gain = nn.Linear(4, 8), nn.Linear(8, 3), nn.Parameter(torch.randn(8))

        def forward(self, parts):
            h = self.first(torch.nested.as_nested_tensor(parts, layout=torch.jagged))
            return self.last(torch.stack([rows.sum(0) for rows in JAGGED[name](h, self.gain).unbind()]))

    def losses(model, step):
        lengths = ((3, 5, 2, 6), (4, 4, 4, 4), (1, 7, 6, 2))[step]
        return random_losses(model([torch.randn(length, 4, dtype=torch.float64) for length in lengths]))

    check(Jagged().double(), losses, 3)


def test_nested_rows_that_are_not_jagged():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, parts):
            h = torch.relu(self.norm(self.first(torch.nested.nested_tensor(parts))))
            h = torch.matmul(torch.softmax(torch.matmul(h, h.transpose(1, 2)), -1), h)
            return self.last(torch.nested.to_padded_tensor(h, 0.0).sum(1))

    def losses(model, step):
        lengths = ((3, 5, 2, 6), (4, 4, 4, 4), (1, 7, 6, 2))[step]
        return random_losses(model([torch.randn(length, 4, dtype=torch.float64) for length in lengths]))

    check(Nested().double(), losses, 3)


@pytest.mark.parametrize("length", [8, 12, 64])
def test_a_layer_called_on_a_grid_of_its_own(length):
    """The grid is a multiple of n long, but neither as long as what is given, nor made of as many numbers."""

    class Filter(nn.Module):
        def __init__(self):
            super().__init__()
            self.make = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))

        def forward(self, x):
            made = self.make(torch.linspace(0, 1, length, dtype=torch.float64)[:, None])
            return x * made.view(-1, 4).sum(0)

    check(Filter().double(), lambda model, _: random_losses(model(torch.randn(4, 4, dtype=torch.float64))), 1)


def test_options_whose_hashes_are_the_same():
    """Autograd keeps -1 as 2^64 - 1, and the hash that Python gives that is 7's."""

    def losses(model, step):
        return random_losses(model(torch.randn(5, 4, 4, dtype=torch.float64), (-1, 7, -1)[step]))

    check(Net(lambda h, by: h.roll(by, 0).sum(1)), losses, 3)


def test_a_slice_to_the_end_is_another_than_one_to_the_third_row():
    """The end is the largest integer then, the hash of which is that of 3."""
    table = nn.Parameter(torch.randn(6, 2))
    found = [trace(losses) for losses in (table[1:].amax(0), table[1:3].amax(0))]
    assert signature_of(found[0], skeleton_of(found[0], 2), 2) != signature_of(found[1], skeleton_of(found[1], 2), 2)


class Places(nn.Module):
    """A table of places ``[time, 4]``, added to tokens of which a loss may read any."""

    def __init__(self, length):
        super().__init__()
        self.table, self.last = nn.Embedding(length, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        return self.last(torch.tanh(x + self.table(torch.arange(x.shape[1]))))


class Planes(nn.Module):
    """A matrix that is repeated for every step of time, by which the tokens of all examples are multiplied."""

    def __init__(self, length):
        super().__init__()
        self.table, self.length = nn.Parameter(torch.randn(4, 4, dtype=torch.float64)), length

    def forward(self, x):
        return torch.bmm(x.transpose(0, 1), self.table.expand(self.length, 4, 4)).transpose(0, 1)


@pytest.mark.parametrize("kind", [Places, Planes])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_tokens_of_one_example_at_every_time(kind, n):
    """What all examples share looks like theirs as long as no two of them read the same part."""

    def losses(model, step):
        read = torch.eye(n, dtype=torch.float64)
        read = (read, read.flip(0), torch.ones(n, n, dtype=torch.float64), read.roll(1, 0))[step]
        return (model(torch.randn(n, n, 4, dtype=torch.float64)).square().sum(2) * read).sum(1)

    torch.manual_seed(0)
    check(kind(n), losses, 4)


@pytest.mark.parametrize("read", ["by layers", "as losses", "by an operator"])
def test_another_output_of_a_node_that_has_several(read):
    """The same nodes, and the same edges between them: which of the halves goes where is all that is different."""

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.left, self.right = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x, swap):
            if read == "as losses":
                return self.right(torch.tanh(self.first(x))).square().sum(1).chunk(2)[int(swap)]
            one, other = torch.tanh(self.first(x)).chunk(2)
            one, other = (other, one) if swap else (one, other)
            rows = [self.left(one), self.right(other)] if read == "by layers" else [one.sin(), other.cos()]
            return torch.cat(rows).square().sum(1)

    def losses(model, step):
        return model(torch.randn(6, 4, dtype=torch.float64), step % 2)

    check(Halves().double(), losses, 4)


def test_a_forward_that_is_put_on_the_class_of_a_layer():
    """What a layer of torch's computes otherwise from then on, it is no longer taken for that layer; and back again."""

    class Mine(nn.Linear):
        pass

    torch.manual_seed(0)
    model = engm.GradNormModule(nn.Sequential(Mine(4, 8), nn.Tanh(), nn.Linear(8, 3)).double())
    for step in range(6):
        if step == 2:
            Mine.forward = lambda self, x: F.linear(2 * x, self.weight, self.bias)
        elif step == 4:
            del Mine.forward
        losses = model(torch.randn(5, 4).double()).square().sum(1)
        expected = per_example_gradients(losses, trained(model)).norms
        torch.testing.assert_close(engm.per_example_grad_norms(model, losses), expected, rtol=1e-9, atol=0)


class Beside(nn.Module):
    """Features in front of the examples, and next to them something that is computed from them by a parameter."""

    def __init__(self):
        super().__init__()
        self.weight, self.shared = nn.Parameter(tensor(3, seed=1)), nn.Parameter(tensor(3, seed=2))

    def forward(self, x, mask, gates):
        rows = torch.cat([x.T, torch.tanh(x.T * self.weight.unsqueeze(1))]) * mask
        return (rows.square().sum(0) + 1e-3).sqrt() + gates * self.shared.sum().tanh()


def test_what_is_moved_is_watched_although_another_plan_saw_nothing_behind():
    """At the second step nothing comes to the layer whose rows seemed to be of one example each at the first."""
    lone = [[0, 0, 0], [0, 0, 1], [1, 0, 0]]
    steps = [  # which examples have inputs, which elements are let through, and who has a share of the number beside
        ([1, 0, 1], [[1, 0, 0], [1, 1, 1], [0, 1, 1], *lone], [0, 1, 1]),
        ([0, 1, 1], [[1, 1, 0], [0, 1, 1], [0, 0, 0], *[[0, 0, 0]] * 3], [1, 1, 1]),
        ([1, 0, 1], [[0, 1, 1], [0, 1, 1], [0, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, 1]], [1, 0, 0]),
    ]
    net = Beside()
    model = engm.GradNormModule(net, check_every=10**6)
    for seed, (there, mask, gates) in enumerate(steps):
        there, mask, gates = (torch.tensor(part).double() for part in (there, mask, gates))
        losses = model(tensor(3, 3, seed=seed) * there.unsqueeze(1), mask, gates)
        expected = per_example_gradients(losses, dict(net.named_parameters())).norms
        torch.testing.assert_close(engm.per_example_grad_norms(model, losses), expected, rtol=1e-9, atol=1e-12)
