"""Functions whose backward trains parameters by itself: a backward pass inside of it leaves gradients in ``.grad``.

Reversible networks and checkpoints written by hand do that. No pass through the graph sees such gradients, so norms
without them would be wrong, which is refused with everything as it was.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import per_example_gradients, relative, trained
from torch import Tensor, nn

import engm

pytestmark = pytest.mark.torch_insides


class Hiding(torch.autograd.Function):
    """Calls a network without a graph, and backwards once more with one, through which it runs a pass to ``.grad``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, network: nn.Module) -> Tensor:
        ctx.network = network
        ctx.save_for_backward(x.detach())
        return network(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            y = ctx.network(x := x.detach().requires_grad_())
        torch.autograd.backward(y, gradient)
        assert x.grad is not None
        return x.grad, None


class Showing(torch.autograd.Function):
    """The same, but the parameters are inputs whose gradients are returned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, network: nn.Module, *parameters: Tensor) -> Tensor:
        ctx.network, ctx.parameters = network, parameters
        ctx.save_for_backward(x.detach())
        return network(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            y = ctx.network(x := x.detach().requires_grad_())
        found = torch.autograd.grad(y, [x, *ctx.parameters], gradient)
        return found[0], None, *found[1:]


class Net(nn.Module):
    """A function around an inner network, behind a trained layer or at the input."""

    def __init__(self, first: bool, shows: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4) if first else nn.Identity()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.last = nn.Linear(4, 3)
        self.shows = shows

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.requires_grad_())
        if self.shows:
            return self.last(Showing.apply(h, self.inner, *self.inner.parameters()))
        return self.last(Hiding.apply(h, self.inner))


def wrapped(first: bool, shows: bool = False, **options: Any) -> engm.GradNormModule:
    torch.manual_seed(0)
    return engm.GradNormModule(Net(first, shows).double(), **options)


def losses_of(model: nn.Module, n: int = 5) -> Tensor:
    x = torch.randn(n, 4, dtype=torch.float64)
    return F.cross_entropy(model(x), torch.arange(n) % 3, reduction="none")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("n", [5, 1])
@pytest.mark.parametrize("first", [True, False])
def test_what_trains_by_itself_is_refused_with_gradients_as_they_were(first, n, strict):
    model = wrapped(first, strict=strict)
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=1.0)
    losses_of(model, n).sum().backward()
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    assert all(kept is not None for kept, _ in before)
    with pytest.raises(RuntimeError, match=r"inner\.0\.weight"):
        opt.backward(losses_of(model, n))
    for parameter, (kept, values) in zip(model.parameters(), before, strict=True):
        assert parameter.grad is kept
        assert torch.equal(kept, values)


@pytest.mark.parametrize("first", [True, False])
def test_it_is_refused_from_the_step_on_at_which_it_trains(first):
    model = wrapped(first)
    model.inner.requires_grad_(False)
    for _ in range(3):
        losses = losses_of(model)
        expected = per_example_gradients(losses, trained(model.unwrap())).norms
        assert relative(engm.per_example_grad_norms(model, losses), expected) <= 1e-9
    model.inner.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"a backward pass inside of a torch.autograd.Function"):
        engm.per_example_grad_norms(model, losses_of(model))


def test_another_network_inside_that_trains_is_refused_in_a_pass_that_runs_it():
    model = wrapped(first=True)
    inner = model.inner
    model.unwrap().inner = nn.Tanh()  # what the function is given is nothing that the graph shows
    model.unwrap().aside = inner
    engm.per_example_grad_norms(model, losses_of(model))
    model.unwrap().inner = inner
    with pytest.raises(RuntimeError, match=r"a backward pass inside of a torch.autograd.Function"):
        engm.per_example_grad_norms(model, losses_of(model))


@pytest.mark.parametrize("first", [True, False])
def test_gradients_that_are_returned_are_right(first):
    model = wrapped(first, shows=True)
    for _ in range(3):
        losses = losses_of(model)
        expected = per_example_gradients(losses, trained(model.unwrap())).norms
        assert relative(engm.per_example_grad_norms(model, losses), expected) <= 1e-9
