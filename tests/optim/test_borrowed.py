"""Norms borrowed from an attack's last step (design 2.10)."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import per_example_gradients, trained
from training import (
    assert_close,
    assert_same,
    backward_passes,
    batch,
    clip,
    grads,
    losses_of,
    median_norm,
    network,
    sgd,
    snapshot,
)

import engm


def attack_step(model, x, y, *, inputs=True):
    """One step as a PGD attack takes it; the adversarial example is left where it is, so norms must agree."""
    adversarial = x.clone().requires_grad_()
    return engm.measure(model, losses_of(model, adversarial, y), adversarial if inputs else None)


def make(norm, method=engm.ENGM, **options):
    net = network(norm)
    x, y = batch(8)
    model = engm.GradNormModule(net, **options)
    return net, model, method(model, sgd(model), median_norm(model, x, y)), x, y


@pytest.mark.parametrize("evaluation", [True, False])
def test_without_coupling_it_is_the_norm_pass(evaluation):
    net, model, opt, x, y = make("group")
    model.train(not evaluation)
    measured = attack_step(model, x, y)
    model.train()
    twin = copy.deepcopy(net)
    exact = per_example_gradients(losses_of(twin, x, y), trained(twin))
    stats = opt.backward(losses_of(model, x, y), measurement=measured)
    assert_close(stats.norms, exact.norms)
    assert_close(grads(model), exact.mean(clip(exact.norms, opt.alpha)))


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("evaluation", [True, False])
@pytest.mark.parametrize("method", [engm.ENGM, engm.NENGM, engm.AENGM, engm.MSGD])
def test_no_norm_pass_is_run(norm, evaluation, method):
    net = network(norm)
    model = engm.GradNormModule(net)
    model.calibration.most_error = float("inf")  # borrowed norms are used as they are, however far off
    opt = method(model, sgd(model), *([] if method is engm.MSGD else [0.3]))
    x, y = batch(8)
    for step in range(2):  # the first has a strict check, a calibration and a regression besides
        model.train(not evaluation)
        measured = attack_step(model, x, y)
        model.train()
        losses = losses_of(model, x, y)
        with backward_passes() as passes:
            opt.backward(losses, measurement=measured)
        assert step == 0 or passes == ["backward"]


@pytest.mark.parametrize("evaluation", [True, False])
def test_coupled_update_is_the_gradient_of_the_reweighted_loss(evaluation):
    net, model, opt, x, y = make("batch")
    model.train(not evaluation)
    measured = attack_step(model, x, y)
    model.train()
    assert measured.mode == ("plain" if evaluation else "frozen")
    twin = copy.deepcopy(net)
    exact = per_example_gradients(losses_of(twin, x, y), trained(twin))
    stats = opt.backward(losses_of(model, x, y), measurement=measured)
    assert_close(grads(model), exact.mean(stats.weights))
    # eight of eight examples calibrate it, every one counting alike, so the mean of the squared ratios is exact
    assert_close(float((stats.norms / exact.norms).square().mean()), 1.0)


def test_factors_are_kept_for_each_way_of_measuring():
    _net, model, opt, x, y = make("batch", calibrate_every=100)
    model.eval()
    borrowed_eval = attack_step(model, x, y)
    model.train()
    borrowed_train = attack_step(model, x, y)
    ways = [borrowed_eval, None, borrowed_train]
    first = [opt.backward(losses_of(model, x, y), measurement=way).norms for way in ways]
    assert len(model.calibration.state_dict()["factors"]) == 3
    draws = model.calibration.sample.draws
    again = [opt.backward(losses_of(model, x, y), measurement=way).norms for way in ways]
    assert model.calibration.sample.draws == draws == 3
    assert_close(again, first)


@pytest.mark.parametrize("method", [engm.NENGM, engm.AENGM])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_input_norms_are_the_measured_ones(method, norm):
    _net, model, opt, x, y = make(norm, method)
    measured = attack_step(model, x, y)
    stats = opt.backward(losses_of(model, x, y), measurement=measured)
    assert_same(stats.input_norms, measured.input_norms)


def test_micro_batches_borrow_their_own_parts():
    _net, model, opt, x, y = make("group")
    opt.backward(losses_of(model, x, y))
    expected = [g.clone() for g in grads(model)]
    opt.zero_grad()
    for rows in (slice(0, 3), slice(3, 8)):
        opt.backward(losses_of(model, x[rows], y[rows]), measurement=attack_step(model, x[rows], y[rows]), divisor=8)
    assert_close(grads(model), expected)


class TestRefused:
    @pytest.mark.parametrize("method", [engm.ENGM, engm.NENGM, engm.AENGM, engm.MSGD])
    def test_of_other_examples(self, method):
        net = network("batch")
        model = engm.GradNormModule(net)
        opt = method(model, sgd(model), *([] if method is engm.MSGD else [0.3]))
        x, y = batch(8)
        measured = attack_step(model, x[:5], y[:5])
        losses = losses_of(model, x, y)
        before = snapshot(opt)
        with pytest.raises(ValueError, match=r"measurement is of 5 examples.*losses are of 8"):
            opt.backward(losses, measurement=measured)
        assert_same(snapshot(opt), before)

    def test_of_another_model(self):
        _, model, opt, x, y = make("batch")
        other = engm.GradNormModule(network("none"))
        measured = attack_step(other, x, y)
        losses = losses_of(model, x, y)
        before = snapshot(opt)
        with pytest.raises(ValueError, match=r"measurement is of .* parameter tensors"):
            opt.backward(losses, measurement=measured)
        assert_same(snapshot(opt), before)

    @pytest.mark.parametrize("method", [engm.NENGM, engm.AENGM])
    @pytest.mark.parametrize("norm", ["group", "batch"])
    def test_without_input_gradients(self, method, norm):
        _net, model, opt, x, y = make(norm, method)
        measured = attack_step(model, x, y, inputs=False)
        losses = losses_of(model, x, y)
        before = snapshot(opt)
        with pytest.raises(ValueError, match="measurement has no input gradients"):
            opt.backward(losses, measurement=measured)
        assert_same(snapshot(opt), before)
        opt.backward(losses, measurement=attack_step(model, x, y))  # the graph is still there

    def test_something_else(self):
        _, model, opt, x, y = make("group")
        losses = losses_of(model, x, y)
        with pytest.raises(TypeError, match=r"measurement must come from engm.measure, got Tensor"):
            opt.backward(losses, measurement=torch.ones(8))

    def test_for_exact_norms(self):
        _, model, opt, x, y = make("batch", batch_norm="exact")
        model.eval()
        measured = attack_step(model, x, y)
        model.train()
        losses = losses_of(model, x, y)
        before = snapshot(opt)
        with pytest.raises(ValueError, match="batch_norm='exact'"):
            opt.backward(losses, measurement=measured)
        assert_same(snapshot(opt), before)
