"""MSGD is plain torch, bit for bit where torch's own order of operations can be kept."""

from __future__ import annotations

import copy

import pytest
import torch
from training import assert_close, assert_same, backward_passes, batch, grads, losses_of, network, sgd

import engm


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ten_steps_are_those_of_plain_sgd(norm, dtype):
    net = network(norm, dtype=dtype)
    plain = copy.deepcopy(net)
    model = engm.GradNormModule(net)
    opt, reference = engm.MSGD(model, sgd(model)), sgd(plain)
    for step in range(10):
        x, y = batch(8, seed=step, dtype=dtype)
        opt.zero_grad()
        stats = opt.backward(losses_of(model, x, y))
        opt.step()
        reference.zero_grad()
        losses_of(plain, x, y).mean().backward()
        reference.step()
        assert_same(stats.weights, torch.ones(8, dtype=dtype))
        assert (stats.norms, stats.input_norms) == (None, None)
    assert_same(net.state_dict(), plain.state_dict())
    assert_same(opt.state_dict()["state"], reference.state_dict()["state"])


def test_one_plain_backward_pass():
    model = engm.GradNormModule(network())
    opt = engm.MSGD(model, sgd(model))
    losses = losses_of(model, *batch())
    with backward_passes() as passes:
        opt.backward(losses)
    assert passes == ["backward"]


@pytest.mark.parametrize("rows", [3, 7])
def test_sizes_that_are_no_power_of_two(rows):
    net = network("batch")
    plain = copy.deepcopy(net)
    model = engm.GradNormModule(net)
    opt = engm.MSGD(model, sgd(model))
    opt.backward(losses_of(model, *batch(rows)), divisor=11, loss_scale=3.0)
    (losses_of(plain, *batch(rows)).sum() * 3 / 11).backward()
    assert_close(grads(model), grads(plain))


def test_reweight_is_the_identity():
    model = engm.GradNormModule(network())
    opt = engm.MSGD(model, sgd(model))
    losses = losses_of(model, *batch())
    assert_same(opt.reweight(losses).detach(), losses.detach())
    opt.reweight(losses).mean().backward()
    assert all(g is not None for g in grads(model))


def test_needs_no_captured_pass():
    net = network()
    plain = copy.deepcopy(net)
    model = engm.GradNormModule(net)
    opt = engm.MSGD(model, sgd(model))
    x, y = batch()
    with model.paused():
        opt.backward(losses_of(model, x, y))
    losses_of(plain, x, y).mean().backward()
    assert_same(grads(model), grads(plain))


def test_losses_of_another_model_are_refused():
    model, other = (engm.GradNormModule(network(seed=seed)) for seed in range(2))
    opt = engm.MSGD(model, sgd(model))
    with pytest.raises(RuntimeError, match="reach no trained parameter of this model"):
        opt.backward(losses_of(other, *batch()))
    assert grads(model) == [None] * len(grads(model))
    assert grads(other) == [None] * len(grads(other))


def test_accumulates_beside_other_losses():
    """A regulariser on the parameters may be backpropagated by itself."""
    net = network()
    plain = copy.deepcopy(net)
    model = engm.GradNormModule(net)
    opt = engm.MSGD(model, sgd(model))
    sum(p.square().sum() for p in model.parameters()).backward()
    opt.backward(losses_of(model, *batch()))
    (sum(p.square().sum() for p in plain.parameters()) + losses_of(plain, *batch()).mean()).backward()
    assert_close(grads(model), grads(plain))
