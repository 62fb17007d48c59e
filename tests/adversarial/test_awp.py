"""Adversarial weight perturbation against a proxy network that takes a step, and what it must give back."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training import assert_close, assert_same, backward_passes, batch, clone, grads, losses_of, network, sgd
from with_beside import losses_of_objective, with_beside

import engm
from engm.adversarial import AWP, OBJECTIVES, trades
from engm.checks import NonFiniteError

GAMMA = 0.05
METHODS: dict[str, Callable[..., Any]] = {
    "engm": lambda model, inner: engm.ENGM(model, inner, 0.8),
    "aengm": lambda model, inner: engm.AENGM(model, inner, 0.8, tau=1),
    "nengm": lambda model, inner: engm.NENGM(model, inner, 0.1),
    "fengm": lambda model, inner: engm.FENGM(model, inner, 1.0),
    "sngm": engm.SNGM,
    "gnc": lambda model, inner: engm.GNC(model, inner, 0.3),
    "msgd": engm.MSGD,
}


def pair(n: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    x, y = batch(n, seed)
    return x, x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype), y


def proxy_weights(net: nn.Module, losses_fn: Callable[[nn.Module], Tensor], gamma: float) -> dict[str, Tensor]:
    """All parameters after the published detour: a copy steps down the negative loss, and that is the direction."""
    proxy = copy.deepcopy(net)
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    optimizer.zero_grad()
    (-losses_fn(proxy).mean()).backward()
    optimizer.step()
    moved = {}
    for (name, old), new in zip(net.named_parameters(), proxy.parameters(), strict=True):
        step = (new - old).detach()
        far = gamma * old.detach().norm() / (step.norm() + 1e-20) if old.dim() > 1 else 0.0
        moved[name] = old.detach() + far * step
    return moved


def state(model: nn.Module) -> dict[str, Tensor]:
    return clone({**dict(model.named_parameters()), **dict(model.named_buffers())})


class TestPerturbation:
    @pytest.mark.parametrize("name", OBJECTIVES)
    @pytest.mark.parametrize("norm", ["group", "batch"])
    @pytest.mark.parametrize("wrap", [engm.GradNormModule, lambda net: net])
    def test_is_that_of_a_proxy_which_takes_a_step(self, name: str, norm: str, wrap: Callable[..., nn.Module]) -> None:
        net, (x, x_adv, y) = network(norm), pair()
        chosen = with_beside(name, network("group"))
        losses_fn = lambda model: losses_of_objective(chosen, model, x, x_adv, y)  # noqa: E731
        expected = proxy_weights(net, losses_fn, GAMMA)
        at_expected = copy.deepcopy(net)
        at_expected.load_state_dict(expected, strict=False)
        losses_fn(at_expected).mean().backward()
        model = wrap(net)
        with AWP(model, GAMMA).perturbed(lambda: losses_fn(model)):
            assert_close(dict(net.named_parameters()), expected, rtol=1e-9, atol=1e-14)
            losses_fn(model).mean().backward()
        assert_close(grads(net), grads(at_expected))
        assert_close(dict(net.named_buffers()), dict(at_expected.named_buffers()))

    @given(
        sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
        n=st.integers(1, 4),
        gamma=st.sampled_from([0.0, 1e-3, 0.3]),
        seed=st.integers(0, 2**16),
        double=st.booleans(),
    )
    @settings(max_examples=30, deadline=None)
    def test_of_nets_nobody_chose(self, sizes: list[int], n: int, gamma: float, seed: int, double: bool) -> None:
        torch.manual_seed(seed)
        dtype = torch.float64 if double else torch.float32
        widths = [3, *sizes, 2]
        layers = [(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(widths)]
        net = nn.Sequential(*(layer for each in layers for layer in each)).to(dtype)
        x, y = torch.randn(n, 3, dtype=dtype), torch.randint(2, (n,))
        expected = proxy_weights(net.double(), lambda proxy: losses_of(proxy, x.double(), y), gamma)
        before = state(net.to(dtype))
        with AWP(net, gamma).perturbed(lambda: losses_of(net, x, y)):
            tolerance = 1e-9 if double else 1e-5
            for key, weight in net.named_parameters():
                torch.testing.assert_close(weight.detach().double(), expected[key], rtol=tolerance, atol=tolerance)
                relative = (weight.detach() - before[key]).norm() / before[key].norm()
                assert relative <= gamma * (1 + 1e-5) + 1e-6 or weight.dim() == 1
        assert_same(state(net), before)

    def test_one_pass_finds_it_and_nothing_is_captured(self) -> None:
        net, (x, y) = network(), batch(4)
        model, seen = engm.GradNormModule(net), []
        net[0].weight.grad = torch.ones_like(net[0].weight)
        before = clone(grads(net))

        def losses_fn() -> Tensor:
            seen.append(losses_of(model, x, y))
            return seen[-1]

        with backward_passes() as passes, AWP(model).perturbed(losses_fn):
            assert passes == ["grad"]
            assert_same(grads(net), before)
        with pytest.raises(RuntimeError, match="captured"):
            engm.measure(model, seen[0])

    def test_works_under_no_grad_and_in_evaluation_mode(self) -> None:
        net, (x, y) = network("batch").eval(), batch(4)
        expected = proxy_weights(net, lambda proxy: losses_of(proxy, x, y), GAMMA)
        with torch.no_grad(), AWP(net, GAMMA).perturbed(lambda: losses_of(net, x, y)):
            assert_close(dict(net.named_parameters()), expected)

    def test_zero_weights_and_zero_gradients_do_not_move(self) -> None:
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).to(dtype)
            nn.init.zeros_(net[2].weight)  # its own length is zero, and so is the gradient of all before it
            before = state(net)
            with AWP(net, 1.0).perturbed(lambda net=net, dtype=dtype: net(torch.ones(2, 3, dtype=dtype)).sum(1)):
                assert_same(state(net), before)

    def test_frozen_and_unreached_parameters_stay(self) -> None:
        net, (x, y) = network(), batch(4)
        net.unused = nn.Linear(2, 2).double()
        net[0].weight.requires_grad_(False)
        losses_fn = lambda: F.cross_entropy(net[:8](x), y, reduction="none")  # noqa: E731
        before = state(net)
        with AWP(net, GAMMA).perturbed(losses_fn):
            moved = {key for key, value in state(net).items() if not torch.equal(value, before[key])}
        assert moved == {"3.weight", "7.weight"}

    def test_half_precision_parameters_move_by_their_share(self) -> None:
        torch.manual_seed(0)
        net = nn.Linear(16, 3).to(torch.float16)
        before = net.weight.detach().double()
        x = 1e-3 * torch.randn(2, 16).to(torch.float16)  # so small that float16 could not hold the scale
        with AWP(net, 0.5).perturbed(lambda: net(x).sum(1)):
            moved = net.weight.detach().double() - before
            assert (moved.norm() / before.norm()).item() == pytest.approx(0.5, rel=0.02)

    def test_autocast_does_not_remember_other_weights(self) -> None:
        torch.manual_seed(0)
        net, x = nn.Linear(8, 3), torch.randn(5, 8)
        with torch.autocast("cpu", torch.bfloat16):
            before = net(x).detach()
            with AWP(net, 1.0).perturbed(lambda: net(x).float().logsumexp(1)):
                within = net(x).detach()
                expected = F.linear(x, net.weight.detach().clone(), net.bias.detach())
            after = net(x).detach()
        assert torch.equal(within, expected)
        assert not torch.equal(within, before)
        assert torch.equal(after, before)


class TestWithTheOptimizers:
    @pytest.mark.parametrize("way", ["backward", "reweight"])
    @pytest.mark.parametrize("norm", ["group", "batch"])
    @pytest.mark.parametrize("method", METHODS)
    def test_gradient_is_taken_at_the_perturbed_weights_and_applied_to_the_others(
        self, method: str, norm: str, way: str
    ) -> None:
        net, (x, x_adv, y) = network(norm), pair()
        there = copy.deepcopy(net)
        there.load_state_dict(proxy_weights(net, lambda proxy: trades(proxy, x, x_adv, y), GAMMA), strict=False)

        def take_gradient(net: nn.Module, awp: bool) -> tuple[Any, list[Tensor | None]]:
            model = engm.GradNormModule(net)
            opt = METHODS[method](model, sgd(model))
            inputs = x_adv.clone().requires_grad_()

            def update() -> None:
                losses = trades(model, x, inputs, y)
                if way == "backward":
                    opt.backward(losses, inputs=inputs)
                else:
                    opt.reweight(losses, inputs=inputs).mean().backward()

            if awp:
                with AWP(model, GAMMA).perturbed(lambda: trades(model, x, inputs, y)):
                    update()
            else:
                update()
            return opt, clone(grads(model))

        before = clone(dict(net.named_parameters()))
        expected, gradients = take_gradient(there, awp=False)
        opt, found = take_gradient(net, awp=True)
        assert_close(found, gradients)
        assert_close(opt.stats.weights, expected.stats.weights)
        assert_same(dict(net.named_parameters()), before)
        plain = copy.deepcopy(net)
        for parameter, gradient in zip(plain.parameters(), grads(net), strict=True):
            parameter.grad = clone(gradient)
        METHODS[method](engm.GradNormModule(plain), inner := sgd(plain)).step()
        opt.step()
        assert inner.param_groups[0]["lr"] == 0.1
        assert_close(dict(net.named_parameters()), dict(plain.named_parameters()))

    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_norms_are_those_of_a_copy_at_the_perturbed_weights(self, name: str) -> None:
        net, (x, x_adv, y) = network("group"), pair()
        chosen = with_beside(name, network("group"))
        losses_fn = lambda model: losses_of_objective(chosen, model, x, x_adv, y)  # noqa: E731
        there = copy.deepcopy(net)
        there.load_state_dict(proxy_weights(net, losses_fn, GAMMA))
        model, at_there = engm.GradNormModule(net), engm.GradNormModule(there)
        with AWP(model, GAMMA).perturbed(lambda: losses_fn(model)):
            norms = engm.per_example_grad_norms(model, losses_fn(model))
        assert_close(norms, engm.naive_grad_norms(at_there, losses_fn(at_there)))
        assert not torch.allclose(norms, engm.naive_grad_norms(model, losses_fn(model)), rtol=1e-3)


class Rebinding(nn.Module):
    """A layer that puts another tensor in its buffer's place at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x


class TestRestoration:
    @pytest.fixture
    def net(self) -> nn.Sequential:
        net = network("batch", dtype=torch.float32)
        net.append(Rebinding())
        return net

    @pytest.fixture
    def case(self) -> tuple[Tensor, Tensor]:
        return batch(4, dtype=torch.float32)

    def test_weights_come_back_bit_for_bit_and_statistics_stay(
        self, net: nn.Sequential, case: tuple[Tensor, Tensor]
    ) -> None:
        awp, before = AWP(net, 0.3), state(net)
        for calls in (1, 2, 3):
            pointers = [p.data_ptr() for p in net.parameters()]
            with awp.perturbed(lambda: losses_of(net, *case)):
                losses_of(net, *case)
            assert [p.data_ptr() for p in net.parameters()] == pointers
            assert_same(dict(net.named_parameters()), {key: before[key] for key, _ in net.named_parameters()})
            assert net[1].num_batches_tracked == net[-1].calls == calls  # the training forward alone
        assert not torch.equal(net[1].running_mean, before["1.running_mean"])

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ArithmeticError, GeneratorExit])
    def test_an_exception_inside_leaves_no_trace(
        self, net: nn.Sequential, case: tuple[Tensor, Tensor], error: type[BaseException]
    ) -> None:
        awp, before = AWP(net, 0.3), state(net)

        def interrupted() -> None:
            losses_of(net, *case)
            assert not torch.equal(net[0].weight, before["0.weight"])
            raise error

        with pytest.raises(error), awp.perturbed(lambda: losses_of(net, *case)):
            interrupted()
        assert_same(state(net), before)
        with awp.perturbed(lambda: losses_of(net, *case)):  # and it may be used again
            pass

    def test_a_context_that_is_forgotten_open_is_closed(self, net: nn.Sequential, case: tuple[Tensor, Tensor]) -> None:
        before = state(net)
        context = AWP(net, 0.3).perturbed(lambda: losses_of(net, *case))
        context.__enter__()
        assert not torch.equal(net[0].weight, before["0.weight"])
        del context
        gc.collect()
        assert_same(state(net), before)

    def test_an_exception_in_the_losses_leaves_no_trace(self, net: nn.Sequential, case: tuple[Tensor, Tensor]) -> None:
        before = state(net)

        def broken() -> Tensor:
            net(case[0])
            raise ArithmeticError("as planned")

        with pytest.raises(ArithmeticError, match="as planned"), AWP(net).perturbed(broken):
            pytest.fail("the body must not run")
        assert_same(state(net), before)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_gradient_that_is_not_finite_is_refused(
        self, net: nn.Sequential, case: tuple[Tensor, Tensor], bad: float
    ) -> None:
        before = state(net)
        with (
            pytest.raises(
                NonFiniteError, match=r"gradient of 3 of AWP's parameters is not finite \('0.weight' first\)"
            ),
            AWP(net).perturbed(lambda: bad * losses_of(net, *case)),
        ):
            pytest.fail("the body must not run")
        assert_same(state(net), before)

    def test_changes_inside_are_refused(self, net: nn.Sequential, case: tuple[Tensor, Tensor]) -> None:
        before, optimizer = state(net), torch.optim.SGD(net.parameters(), 0.1)
        net[0].weight.grad = torch.ones_like(net[0].weight)
        with (
            pytest.raises(RuntimeError, match=r"call opt.step\(\) after the context"),
            AWP(net).perturbed(lambda: losses_of(net, *case)),
        ):
            optimizer.step()
        assert_same(state(net), before)

    def test_a_graph_must_be_used_inside(self, net: nn.Sequential, case: tuple[Tensor, Tensor]) -> None:
        with AWP(net).perturbed(lambda: losses_of(net, *case)):
            losses = losses_of(net, *case)
        with pytest.raises(RuntimeError, match="inplace operation"):
            losses.mean().backward()

    def test_nesting_is_refused(self, net: nn.Sequential, case: tuple[Tensor, Tensor]) -> None:
        awp, before = AWP(net), state(net)
        with (
            pytest.raises(RuntimeError, match="perturbs its model already"),
            awp.perturbed(lambda: losses_of(net, *case)),
            awp.perturbed(lambda: losses_of(net, *case)),
        ):
            pytest.fail("the body must not run")
        assert_same(state(net), before)


@pytest.mark.parametrize(
    ("losses_fn", "error", "message"),
    [
        (lambda net, x, y: losses_of(net, x, y).mean(), ValueError, r"shape \[n\]"),
        (lambda net, x, y: losses_of(net, x, y).detach(), ValueError, "no graph"),
        (lambda net, x, y: None, TypeError, "must be a tensor"),
        (lambda net, x, y: losses_of(copy.deepcopy(net), x, y), ValueError, "from that very model"),
    ],
)
def test_bad_losses(losses_fn: Callable[..., Any], error: type[Exception], message: str) -> None:
    net, (x, y) = network("batch"), batch(4)
    before = state(net)
    with pytest.raises(error, match=message), AWP(net).perturbed(lambda: losses_fn(net, x, y)):
        pytest.fail("the body must not run")
    assert_same(state(net), before)


def test_bad_arguments() -> None:
    for gamma in (-1e-3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="gamma must be a finite number >= 0"):
            AWP(network(), gamma)
    with pytest.raises(TypeError, match=r"perturbs a torch.nn.Module, got function"):
        AWP(lambda x: x)  # type: ignore[arg-type]
    frozen = network().requires_grad_(False)
    with pytest.raises(ValueError, match="the model has none"), AWP(frozen).perturbed(lambda: torch.ones(1)):
        pytest.fail("the body must not run")
