"""Hooks and functions of the user's that change gradients by how large they are over the batch, from some step on.

The graph shows neither when they bite nor that they do. They all clip above ``BOUND``, which the tests lower after
steps at which nothing was clipped. The examples then influence each other, which is refused before a norm is handed
out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import per_example_gradients, relative, tensor, trained
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import engm
from engm.graph.trace import Trace, trace

pytestmark = pytest.mark.torch_insides

BOUND = [1e9]
Between = Callable[[nn.Module, Tensor], Tensor]


@pytest.fixture(autouse=True)
def nothing_is_clipped() -> Iterator[None]:
    yield
    BOUND[0] = 1e9


def clipped(gradient: Any) -> Any:
    norm = 0 if gradient is None else gradient.norm()
    return gradient if norm <= BOUND[0] else gradient * (BOUND[0] / norm)


class Clip(torch.autograd.Function):
    """Hands on its input, and backwards the gradient, clipped over the batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return clipped(gradient)


class ClipOfTwo(torch.autograd.Function):
    """The same for two inputs and two outputs, with an argument that is no tensor in between."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, scale: float, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.scale = scale
        return scale * a, b.clone()

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]
        return ctx.scale * first, None, clipped(second)


class Clamp(torch.autograd.Function):
    """Hands on its input, and backwards the gradient, element by element no larger than the bound."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.clamp(-BOUND[0], BOUND[0])


class Doubled(torch.autograd.Function):
    """Twice its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * gradient


def function(net: nn.Module, h: Tensor) -> Tensor:
    return Clip.apply(h)


def function_of_two(net: nn.Module, h: Tensor) -> Tensor:
    first, second = ClipOfTwo.apply(h, 0.5, h.sin())
    return first + second


def output_of_a_function_alone(net: nn.Module, h: Tensor) -> Tensor:
    return ClipOfTwo.apply(h, 0.5, h.sin())[1]


def recomputed_function(net: nn.Module, h: Tensor) -> Tensor:
    return checkpoint(lambda h: Clip.apply(h.sin()), h, use_reentrant=False)


def tensor_hook(net: nn.Module, h: Tensor) -> Tensor:
    h.register_hook(clipped)
    return h


def node_hook(net: nn.Module, h: Tensor) -> Tensor:
    h = h.sin()
    h.grad_fn.register_hook(lambda passed, given: tuple(map(clipped, passed)))  # type: ignore[union-attr]
    return h


def node_prehook(net: nn.Module, h: Tensor) -> Tensor:
    h = h.sin()
    h.grad_fn.register_prehook(lambda given: tuple(map(clipped, given)))  # type: ignore[union-attr]
    return h


def module_hook(net: nn.Module, h: Tensor) -> Tensor:
    handle = net.middle.register_full_backward_hook(lambda module, passed, given: tuple(map(clipped, passed)))
    h = net.middle(h)
    handle.remove()
    return h


HOOKS = (tensor_hook, node_hook, node_prehook, module_hook)
CLIPPING = (function, function_of_two, output_of_a_function_alone, recomputed_function, *HOOKS)


class Net(nn.Module):
    """Three layers, and what lies between."""

    def __init__(self, between: Between) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)
        self.between = between
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.between(self, torch.tanh(self.first(x)))))


def losses_of(model: nn.Module, step: int, shape: tuple[int, ...] = (6, 3, 6)) -> Tensor:
    return model(tensor(*shape, seed=step)).square().flatten(1).sum(1)


def assert_right(model: engm.GradNormModule, losses: Tensor) -> None:
    expected = per_example_gradients(losses, trained(model.unwrap()))
    assert relative(engm.per_example_grad_norms(model, losses), expected.norms) < 1e-9


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("between", CLIPPING)
@pytest.mark.parametrize("shape", [(6, 6), (6, 3, 6), (2, 3, 6)])
def test_what_clips_over_the_batch_is_refused_at_the_step_at_which_it_bites(between, shape, strict):
    model = engm.GradNormModule(Net(between), strict=strict)
    for step in range(5):
        assert_right(model, losses_of(model, step, shape))
    BOUND[0] = 0.1
    with pytest.raises(RuntimeError, match=r"for some examples influences .* a gradient clipped by its norm"):
        engm.per_example_grad_norms(model, losses_of(model, 5, shape))
    BOUND[0] = 1e9
    assert_right(model, losses_of(model, 6, shape))


@pytest.mark.parametrize("between", CLIPPING)
def test_an_update_is_refused_before_anything_is_changed(between):
    model = engm.GradNormModule(Net(between))
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.1), alpha=1.0)
    for step in range(4):
        opt.backward(losses_of(model, step))
        opt.zero_grad()
    BOUND[0] = 0.1
    with pytest.raises(RuntimeError, match="for some examples influences"):
        opt.backward(losses_of(model, 4))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("between", CLIPPING)
def test_coupled_examples_are_right_or_refused(between):
    """What a function does to every example by itself is known; hooks are a part of what all examples share."""
    model = engm.GradNormModule(Net(between), coupled="exact")
    for step in range(5):
        assert_right(model, losses_of(model, step))
    BOUND[0] = 0.1
    for step in range(5, 8):
        losses = losses_of(model, step)
        if between in HOOKS:
            with pytest.raises(RuntimeError, match="do not add up to the gradient"):
                engm.per_example_grad_norms(model, losses)
        else:
            assert_right(model, losses)


def clamp(net: nn.Module, h: Tensor) -> Tensor:
    return Clamp.apply(h)


def clamp_in_a_hook(net: nn.Module, h: Tensor) -> Tensor:
    h.register_hook(lambda gradient: gradient.clamp(-BOUND[0], BOUND[0]))
    return h


def clamp_by_row(net: nn.Module, h: Tensor) -> Tensor:
    h.register_hook(lambda gradient: gradient * (BOUND[0] / gradient.norm(dim=-1, keepdim=True)).clamp(max=1))
    return h


@pytest.mark.parametrize("between", [clamp, clamp_in_a_hook, clamp_by_row])
def test_what_clips_every_row_by_itself_is_right(between):
    model = engm.GradNormModule(Net(between), check_every=1)
    for step in range(8):
        BOUND[0] = 1e9 if step < 4 else 0.05
        assert_right(model, losses_of(model, step))


def hook_on_a_weight(weight: Tensor) -> Tensor:
    weight = weight.exp()
    weight.register_hook(clipped)
    return weight


@pytest.mark.parametrize("effective", [hook_on_a_weight, Clip.apply, lambda weight: Clip.apply(weight.t()).t()])
def test_what_clips_the_gradient_of_a_weight_is_refused(effective):
    """Every example's gradient would be clipped by itself, and the weighted sum of all of them as one."""

    def between(net: nn.Module, h: Tensor) -> Tensor:
        return nn.functional.linear(h, effective(net.middle.weight))

    model = engm.GradNormModule(Net(between), strict=False)
    for step in range(5):
        assert_right(model, losses_of(model, step))
    BOUND[0] = 0.1
    with pytest.raises(RuntimeError, match=r"between \w+ and a parameter a hook"):
        engm.per_example_grad_norms(model, losses_of(model, 5))


@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_a_weight_that_are_nothing_but_rounding(seed):
    """That of the bias in front of what is centred over the batch. It does not add up, and nothing is clipped."""
    model = engm.GradNormModule(Net(lambda net, h: (y := net.middle(h)) - y.mean(0)), coupled="exact")
    assert_right(model, losses_of(model, seed, (9, 6)))


ORDER = [torch.arange(6)]


class Moved(torch.autograd.Function):
    """Its rows in the order that a global variable says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x[ORDER[0]]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.zeros_like(gradient).index_add(0, ORDER[0], gradient)


class MovedBy(torch.autograd.Function):
    """Its rows, moved on by a number that may pass for a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Tensor) -> Tensor:
        ctx.save_for_backward(by)
        return x.roll(int(by), 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.roll(-int(ctx.saved_tensors[0]), 0), None


def moved(net: nn.Module, h: Tensor) -> Tensor:
    return Moved.apply(h)


def moved_by(net: nn.Module, h: Tensor) -> Tensor:
    return MovedBy.apply(h, ORDER[0][:1].double())


@pytest.mark.parametrize("shape", [(6, 6), (6, 3, 6)])
@pytest.mark.parametrize("between", [moved, moved_by])
def test_functions_that_move_rows_by_what_is_not_compared(between, shape):
    model = engm.GradNormModule(Net(between))
    for step in range(8):
        ORDER[0] = torch.arange(6) if step < 3 else torch.arange(6).roll(step)
        assert_right(model, losses_of(model, step, shape))


MATRIX = [torch.eye(6, dtype=torch.float64)]


class Mixed(torch.autograd.Function):
    """Its rows, multiplied by a matrix that a global variable holds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.tensordot(MATRIX[0], x, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.tensordot(MATRIX[0].T, gradient, 1)


@pytest.mark.parametrize("shape", [(6, 6), (6, 3, 6)])
def test_a_function_that_begins_to_mix_two_examples(shape):
    model = engm.GradNormModule(Net(lambda net, h: Mixed.apply(h)))
    for step in range(5):
        MATRIX[0] = torch.diag(torch.rand(6, dtype=torch.float64) + 0.5)
        assert_right(model, losses_of(model, step, shape))
    assert list(model.engm_plans.values()), "a plan was kept, so that this is no measurement of every step"
    MATRIX[0][1, 4] = 1e-3
    with pytest.raises(RuntimeError, match="for some examples influences"):
        engm.per_example_grad_norms(model, losses_of(model, 5, shape))


def test_elements_of_what_a_recurrent_layer_made_are_clipped():
    """As recurrent networks often have it; what looks mixed at first is asked again, and the second answer counts."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.last = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 4)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            h, _ = self.recurrent(x)
            h.register_hook(lambda gradient: gradient.clamp(-BOUND[0], BOUND[0]))
            return self.last(h)

    model = engm.GradNormModule(Recurrent())
    for step in range(6):
        BOUND[0] = 1e9 if step < 1 else 0.02
        assert_right(model, losses_of(model, step))


@pytest.mark.parametrize("between", [clamp, clamp_in_a_hook])
def test_the_update_where_elements_are_clipped_and_time_comes_first(between):
    """Nothing but the gradients tells that the first layer's rows, no multiple of n, are the examples'."""
    net = Net(between)
    model = engm.GradNormModule(net)
    BOUND[0] = 0.05
    for step in range(3):
        losses = model(tensor(5, 4, 6, seed=step)).square().sum((0, 2))
        expected = per_example_gradients(losses, trained(net))
        opt = engm.ENGM(model, torch.optim.SGD(net.parameters(), 0.1), alpha=float(expected.norms.median()))
        opt.zero_grad()
        stats = opt.backward(losses)
        assert relative(stats.norms, expected.norms) < 1e-9
        for name, wanted in expected.update(stats.weights).items():
            assert name.startswith("middle") or relative(trained(net)[name].grad, wanted) < 1e-9, name


def passes(model: engm.GradNormModule, step: int, counted: list[int]) -> int:
    """How many backward passes the norms of a step take; a hook of the first layer counts them."""
    counted[0] = 0
    engm.per_example_grad_norms(model, losses_of(model, step))
    return counted[0]


def test_what_watching_costs():
    """One scaled pass where hooks hang, for a function no pass at all, and for neither nothing."""
    counted = [0]

    class Counting(Doubled):
        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            counted[0] += 1
            return 2 * gradient

    def counting(net: nn.Module, h: Tensor) -> Tensor:
        return Counting.apply(h)

    def counting_and_hook(net: nn.Module, h: Tensor) -> Tensor:
        return tensor_hook(net, Counting.apply(h))

    for between, wanted in ((counting, 2), (counting_and_hook, 2)):  # of a function the backward runs twice in a pass
        model = engm.GradNormModule(Net(between))
        assert [passes(model, step, counted) for step in range(5)][-1] == wanted
        assert bool(next(iter(model.engm_plans.values()), [])) == (between is counting)  # a plan is kept


def test_the_sums_tell_of_hooks_that_nobody_counted(monkeypatch):
    """As those that hang while ``fully_shard`` hangs its own."""
    monkeypatch.setattr(Trace, "hooked", property(lambda self: False, lambda self, value: None))
    model = engm.GradNormModule(Net(tensor_hook), check_every=4)
    for step in range(4):
        assert_right(model, losses_of(model, step))
    BOUND[0] = 0.1
    with pytest.raises(RuntimeError, match="do not add up to the gradient"):
        engm.per_example_grad_norms(model, losses_of(model, 4))


def test_hooks_of_another_graph_do_not_matter():
    """Hooks that hung before the forward pass, and those of engm itself, do not keep a plan from being kept."""
    model = engm.GradNormModule(Net(function))
    before = tensor(3).requires_grad_() * 2
    before.register_hook(clipped)
    losses = losses_of(model, 0)
    first = engm.measure(model, losses)
    assert len(model.engm_plans) == 1
    torch.testing.assert_close(engm.measure(model, losses).norms, first.norms)
    assert len(model.engm_plans) == 1


def test_no_hook_of_engm_is_taken_for_somebody_elses():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.LazyLinear(4)).double()
    net(tensor(4, 2, 4, 4))
    model = engm.GradNormModule(net, calibrate_examples=2)
    opt = engm.AENGM(model, torch.optim.SGD(model.parameters(), 0.1), alpha=1.0, tau=2)
    for step in range(3):
        opt.zero_grad()
        x = tensor(4, 2, 4, 4, seed=step)
        losses = model(x).square().sum(1)
        opt.backward(losses, inputs=x)
        assert not trace(losses).hooked


def test_explain_says_that_hooks_are_measured_at_every_step():
    assert "measured" in str(engm.explain(Net(tensor_hook), tensor(4, 3, 6))).splitlines()[-1]
