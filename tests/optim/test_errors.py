"""Every refusal of section 3: one clear error, and parameters, gradients, state, buffers and counters untouched."""

from __future__ import annotations

import pytest
import torch
from methods import METHODS, every
from torch import nn
from training import assert_same, batch, grads, losses_of, network, sgd, snapshot

import engm

METERED = [name for name in METHODS if name not in ("msgd", "sngm", "gnc")]


def make(method="engm", norm="batch", **options):
    """An optimizer in the middle of a run, with gradients, momentum, factors and coefficients to lose."""
    model = engm.GradNormModule(network(norm), calibrate_every=1, **options)
    opt = METHODS[method](model, sgd(model))
    for step in range(2):
        x, y = batch(8, seed=step)
        opt.backward(losses_of(model, x, y), x)
        opt.step()
    return model, opt, *batch(8, seed=5)


def check(opt, error, message, losses, inputs=None, call="backward", **arguments):
    before = snapshot(opt)
    with pytest.raises(error, match=message):
        getattr(opt, call)(losses, inputs, **arguments)
    assert_same(snapshot(opt), before)


both_calls = pytest.mark.parametrize("call", ["backward", "reweight"])
both_norms = pytest.mark.parametrize("norm", ["group", "batch"])


@every()
@both_calls
class TestLosses:
    def test_scalar(self, method, call):
        model, opt, x, y = make(method)
        check(
            opt, ValueError, r"losses must have shape \[n\].*reduction='none'", losses_of(model, x, y).mean(), x, call
        )

    def test_a_loss_a_position(self, method, call):
        model, opt, x, _y = make(method)
        check(opt, ValueError, r"losses must have shape \[n\].*got \(8, 5\)", model(x), x, call)

    def test_a_number(self, method, call):
        _model, opt, x, _y = make(method)
        check(opt, TypeError, r"losses must be a tensor \[n\].*got float", 0.5, x, call)

    def test_no_example(self, method, call):
        model, opt, x, y = make(method)
        check(opt, ValueError, "losses has no example", losses_of(model, x, y)[:0], x, call)

    def test_no_graph(self, method, call):
        model, opt, x, y = make(method)
        check(opt, ValueError, "losses has no graph", losses_of(model, x, y).detach(), x, call)
        with torch.no_grad():
            losses = losses_of(model, x, y)
        check(opt, ValueError, "losses has no graph", losses, x, call)

    def test_not_finite(self, method, call):
        model, opt, x, y = make(method)
        for bad in (float("nan"), float("inf")):
            losses = losses_of(model, x, y) * torch.tensor([1, 1, bad, 1, 1, 1, 1, bad], dtype=torch.float64)
            check(opt, ValueError, r"losses of examples \[2, 7\] are not finite.*check=False", losses, x, call)

    def test_loss_scale(self, method, call):
        model, opt, x, y = make(method)
        for scale in (0, -1.0, float("nan"), float("inf"), "much", None):
            check(opt, ValueError, "loss_scale must be", losses_of(model, x, y), x, call, loss_scale=scale)


@every(*METERED)
@both_norms
@both_calls
class TestModels:
    def test_losses_of_another_model(self, method, norm, call):
        _model, opt, x, y = make(method, norm)
        other = engm.GradNormModule(network(norm, seed=1))
        check(opt, RuntimeError, "belong to another GradNormModule", losses_of(other, x, y), x, call)
        assert grads(other) == [None] * len(grads(other))

    def test_losses_of_a_model_that_nobody_wrapped(self, method, norm, call):
        _model, opt, x, y = make(method, norm)
        check(opt, RuntimeError, "not computed by a captured forward pass", losses_of(network(norm), x, y), x, call)

    def test_the_network_called_directly_or_in_a_pause(self, method, norm, call):
        model, opt, x, y = make(method, norm)
        losses = losses_of(model.unwrap(), x, y)
        check(opt, RuntimeError, "Call the GradNormModule itself", losses, x, call)
        with model.paused():
            losses = losses_of(model, x, y)
        check(opt, RuntimeError, "Call the GradNormModule itself", losses, x, call)


class TestDivisor:
    @every()
    def test_must_be_positive(self, method):
        model, opt, x, y = make(method)
        for divisor in (0, -3, float("nan"), float("inf"), "eight", []):
            check(opt, ValueError, "divisor must be", losses_of(model, x, y), x, divisor=divisor)


class TestAlpha:
    @every(*METERED)
    @both_norms
    def test_set_to_nonsense_between_steps(self, method, norm):
        model, opt, x, y = make(method, norm)
        losses = losses_of(model, x, y)
        good = opt.alpha
        for opt.alpha in (0.0, -1, float("nan"), "x"):
            check(opt, ValueError, "alpha", losses, x)
        opt.alpha = good
        opt.backward(losses, x)  # the graph is still there


class Mixing(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class TestStrict:
    @both_calls
    @every(*METERED)
    def test_first_step(self, method, call):
        net = network("batch").append(Mixing()).double()
        model = engm.GradNormModule(net)
        opt = METHODS[method](model, sgd(model))
        x, y = batch()
        message = "influences the losses of other examples"
        check(opt, RuntimeError, message, losses_of(model, x, y), x, call)
        assert model.calibration.sample.draws == 0


class TestSpentGraphs:
    @every(*METERED)
    @both_norms
    def test_backward_twice(self, method, norm):
        model, opt, x, y = make(method, norm)
        losses = losses_of(model, x, y)
        opt.backward(losses, x)
        check(opt, RuntimeError, "backward through the graph a second time", losses, x)

    @every(*METERED)
    @both_norms
    def test_after_a_plain_backward(self, method, norm):
        model, opt, x, y = make(method, norm)
        losses = losses_of(model, x, y)
        losses.sum().backward()
        check(opt, RuntimeError, "backward through the graph a second time", losses, x)
