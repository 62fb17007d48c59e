"""MSGD is plain torch, bit for bit where torch's own order of operations can be kept; the others, what they say."""

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
    grads,
    losses_of,
    network,
    sgd,
)

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


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_gnc_is_torchs_clip_grad_norm(norm, max_norm):
    net = network(norm)
    plain = copy.deepcopy(net)
    model = engm.GradNormModule(net)
    opt, reference = engm.GNC(model, sgd(model), max_norm), sgd(plain)
    for step in range(5):
        x, y = batch(8, seed=step)
        opt.zero_grad()
        opt.backward(losses_of(model, x, y))
        opt.step()
        reference.zero_grad()
        losses_of(plain, x, y).mean().backward()
        before = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        reference.step()
        assert_close(opt.grad_norm, before, rtol=1e-4)
        # Torch divides by the norm plus 1e-6.
        assert_close(list(model.state_dict().values()), list(plain.state_dict().values()), rtol=1e-4, atol=1e-6)


def test_sngm_steps_have_length_one():
    """Eq. 4 with no momentum: the step is lr long, whatever the losses are multiplied by."""
    model = engm.GradNormModule(network())
    opt = engm.SNGM(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for factor in (1.0, 1e-3, 1e4):
        before = [p.detach().clone() for p in model.parameters()]
        opt.zero_grad()
        opt.backward(losses_of(model, *batch()) * factor)
        opt.step()
        moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
        assert_close(moved.norm(), torch.tensor(0.1, dtype=torch.float64))


def test_sngm_takes_the_direction_of_all_micro_batches():
    net = network()
    whole, parts = engm.GradNormModule(net), engm.GradNormModule(copy.deepcopy(net))
    x, y = batch(8)
    one, two = engm.SNGM(whole, sgd(whole)), engm.SNGM(parts, sgd(parts))
    one.backward(losses_of(whole, x, y))
    for rows in (slice(0, 3), slice(3, 8)):
        two.backward(losses_of(parts, x[rows], y[rows]), divisor=8)
    one.step(), two.step()
    assert_close(list(parts.state_dict().values()), list(whole.state_dict().values()))


def test_a_gradient_of_zero_stays_zero():
    model = engm.GradNormModule(network())
    for opt in (engm.SNGM(model, sgd(model)), engm.GNC(model, sgd(model))):
        opt.zero_grad()
        opt.backward(losses_of(model, *batch()) * 0.0)
        opt.step()
        assert all(p.isfinite().all() for p in model.parameters())
        assert opt.grad_norm == 0


@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("alpha", [1.0, 3.5])
def test_fengm_gives_every_gradient_the_norm_alpha(norm, alpha):
    model = engm.GradNormModule(network(norm))
    opt = engm.FENGM(model, sgd(model), alpha)
    x, y = batch()
    exact = per_example_gradients(losses_of(model, x, y), trained(model))
    stats = opt.backward(losses_of(model, x, y))
    assert_close(stats.norms, exact.norms)
    assert_close(stats.weights * exact.norms, torch.full((8,), alpha, dtype=torch.float64))
    assert_close(grads(model), exact.mean(alpha / exact.norms))


def test_fengm_leaves_a_zero_gradient_and_shows_a_broken_one():
    model = engm.GradNormModule(network())
    opt = engm.FENGM(model, sgd(model))
    losses = losses_of(model, *batch()) * torch.tensor([0.0, *[1.0] * 7], dtype=torch.float64)
    weights = opt.backward(losses).weights
    assert weights[0] == 1
    assert (weights[1:] != 1).all()
    losses = losses_of(model, *batch()) * torch.tensor([float("inf"), *[1.0] * 7], dtype=torch.float64)
    weights = opt.backward(losses, check=False).weights
    assert weights[0].isnan()
    assert weights[1:].isfinite().all()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "x"])
def test_thresholds_must_be_positive(value):
    model = engm.GradNormModule(network())
    with pytest.raises(ValueError, match="max_norm must be a positive"):
        engm.GNC(model, sgd(model), value)
    with pytest.raises(ValueError, match="alpha must be a positive"):
        engm.FENGM(model, sgd(model), value)


def test_a_checkpoint_restores_the_threshold():
    model = engm.GradNormModule(network())
    for make, name, value in ((engm.ENGM, "alpha", 7.0), (engm.GNC, "max_norm", 3.0), (engm.NENGM, "alpha", 0.2)):
        saved = make(model, sgd(model), value).state_dict()
        other = make(model, sgd(model), 1.0)
        other.load_state_dict(saved)
        assert getattr(other, name) == value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 10.0])
@pytest.mark.parametrize("make", [engm.SNGM, lambda m, s: engm.GNC(m, s, 1e-7)])
def test_factors_that_do_not_fit_into_16_bits(make, size, dtype):
    model = engm.GradNormModule(torch.nn.Linear(16, 8, bias=False).to(dtype))
    opt = make(model, torch.optim.SGD(model.parameters(), 0.0))
    (weight,) = model.parameters()
    generator = torch.Generator().manual_seed(0)
    weight.grad = (size * torch.randn(8, 16, generator=generator).clamp(-2, 2)).to(dtype)
    norm = weight.grad.double().norm()
    wanted = weight.grad.double() * (1 / norm if make is engm.SNGM else min(1e-7 / norm, 1))
    opt.step()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(weight.grad.double(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=smallest)


@pytest.mark.parametrize("make", [engm.SNGM, engm.GNC])
def test_a_norm_that_overflows_is_no_silent_zero(make):
    model = engm.GradNormModule(torch.nn.Linear(4, 3, bias=False))
    opt = make(model, torch.optim.SGD(model.parameters(), 0.0))
    (weight,) = model.parameters()
    weight.grad = torch.full((3, 4), 1e30)
    opt.step()
    assert not bool(weight.grad.isfinite().any())
