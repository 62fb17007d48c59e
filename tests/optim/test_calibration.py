"""When factors are taken, from which examples, and that nothing but the seed decides it."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import per_example_gradients, trained
from torch import nn
from training import (
    assert_close,
    assert_same,
    batch,
    losses_of,
    network,
    sgd,
)

import engm
from engm.batch_norm.calibration import Calibration
from engm.batch_norm.factors import FactorKey
from engm.batch_norm.probe import ExactSample
from engm.terms.loss_scale import LossScale


def factors_of(model):
    """The only factors there are, those of the model's own passes."""
    (entry,) = model.calibration.state_dict()["factors"]
    assert (entry["mode"], entry["borrowed"], entry["all_ranks"]) == ("corrected", False, False)
    return entry["values"]


def make(method=engm.ENGM, **options):
    model = engm.GradNormModule(network("batch"), **options)
    return model, method(model, sgd(model, lr=0.01), 0.5)


def draws_over(model, opt, steps):
    found = []
    for step in range(steps):
        x, y = batch(8, seed=step)
        before = model.calibration.sample.draws
        opt.backward(losses_of(model, x, y))
        opt.step()
        opt.zero_grad()
        if model.calibration.sample.draws > before:
            found.append(step)
    return found


def test_every_so_many_steps():
    assert draws_over(*make(calibrate_every=3), 8) == [0, 3, 6]
    assert draws_over(*make(calibrate_every=1), 3) == [0, 1, 2]


@pytest.mark.parametrize("mode", ["frozen", "exact"])
def test_never_where_norms_are_raw_or_exact(mode):
    assert draws_over(*make(batch_norm=mode, calibrate_every=1), 2) == []


def test_ages_by_steps_and_not_by_uses():
    """A-ENGM asks for norms every tau steps; its factors must not be tau times as old for that."""
    model = engm.GradNormModule(network("batch"), calibrate_every=4)
    opt = engm.AENGM(model, sgd(model, lr=0.01), 0.5, tau=2)
    found = []
    for step in range(9):
        x, y = batch(8, seed=step)
        before = model.calibration.sample.draws
        opt.backward(losses_of(model, x, y), x)
        found += [step] if model.calibration.sample.draws > before else []
    assert found == [0, 4, 8]


def test_norms_alone_calibrate_once_and_count_no_step():
    model, _opt = make(calibrate_every=2)
    x, y = batch(8)
    for _ in range(5):
        engm.per_example_grad_norms(model, losses_of(model, x, y))
    assert model.calibration.sample.draws == 1
    assert model.calibration.steps == 0


def test_factor_is_exact_over_measured_for_each_tensor():
    model, _ = make(calibrate_examples=8)
    x, y = batch(8)
    twin = copy.deepcopy(model.unwrap())
    found = per_example_gradients(losses_of(twin, x, y), trained(twin)).squared_norms
    exact = torch.stack(list(found.values()), 1)
    losses = losses_of(model, x, y)
    measured = engm.measure(model, losses)
    parameters = model.trainable_parameters()
    factors = model.calibration.factors(FactorKey("frozen", False), measured.stacked, losses, parameters, count=True)
    share = 1 / exact.sum(1)  # every example counts alike
    expected = share @ exact / (measured.stacked @ share)
    zero_bias = torch.tensor([name in ("0.bias", "3.bias") for name, _ in parameters])  # cancelled by the batch norm
    assert_close(factors[~zero_bias], expected[~zero_bias])
    assert factors[zero_bias].abs().max() < 1e-20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_over_rounding_is_one(dtype):
    """A bias in front of a batch norm has no gradient; what is left of it is no measure of anything."""
    torch.manual_seed(0)
    blocks = [layer for c in (3, 4) for layer in (nn.Conv2d(c, 4, 3), nn.BatchNorm2d(4), nn.Tanh())]
    net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64, 5)).to(dtype)
    model = engm.GradNormModule(net)
    opt = engm.ENGM(model, sgd(model, lr=0.01), 0.5)
    x, y = torch.randn(8, 3, 8, 8, dtype=dtype), torch.arange(8) % 5
    opt.backward(losses_of(model, x, y))
    factors = dict(zip(trained(net), factors_of(model).tolist(), strict=True))
    assert factors["0.bias"] == factors["3.bias"] == 1
    assert factors["0.weight"] != 1  # two batch norms are not corrected exactly


def test_zero_over_zero_is_one_and_exact_zero_is_zero():
    calibration = Calibration(every=1, examples=4)
    used = torch.ones(3, dtype=torch.float64, requires_grad=True)
    unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
    losses = (used * torch.arange(12, dtype=torch.float64).view(4, 3)).sum(1)
    measured = torch.tensor([[4.0] * 4, [1.0] * 4, [0.0] * 4], dtype=torch.float64)
    parameters = [("used", used), ("unused", unused), ("nowhere", unused)]
    factors = calibration.factors(FactorKey("way", False), measured, losses, parameters, count=True)
    whole = torch.arange(12, dtype=torch.float64).view(4, 3).square().sum(1)
    assert factors.tolist() == [pytest.approx(float(1 / (1 / whole).mean()) / 4), 0.0, 1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_keeps_the_old_factors_and_tries_again_at_once(bad):
    model, opt = make(calibrate_every=2)
    x, y = batch(8)
    scale = torch.full((8,), bad, dtype=torch.float64)
    opt.backward(losses_of(model, x, y) * scale, check=False)
    values = factors_of(model)
    assert values.tolist() == [1.0] * len(values)
    opt.backward(losses_of(model, x, y))
    before = factors_of(model).clone()
    assert before.tolist() != [1.0] * len(values), "taken although they were not due"
    opt.backward(losses_of(model, x, y))
    opt.backward(losses_of(model, x, y) * scale, check=False)
    assert model.calibration.sample.draws == 3
    assert_same(factors_of(model), before)


def test_float16_needs_the_loss_scale_in_the_probe_too():
    """Without it the exact gradients of a small loss vanish in float16, and with them what a factor is made of."""
    weight = torch.ones(4, dtype=torch.float16, requires_grad=True)
    losses = (weight * torch.full((6, 4), 2.0**-13, dtype=torch.float16)).sum(1) * 2.0**-13
    measured = torch.full((1, 6), 2 * 4 * 2.0**-52)  # twice too large
    calibration = Calibration(every=1, examples=6)
    assert calibration.factors(FactorKey("plain", False), measured, losses, [("w", weight)], count=True).item() != 0.5
    scaled = calibration.factors(
        FactorKey("scaled", False), measured, losses, [("w", weight)], count=True, scale=LossScale(2.0**10)
    )
    assert scaled.item() == 0.5


def test_parameters_that_are_trained_for_the_first_time_are_calibrated_at_once():
    """Layers that are frozen and thawed in turn keep their factors."""
    model, opt = make(calibrate_every=100)
    x, y = batch(8)
    draws = []
    for frozen in (True, False, True, False, True):
        model.unwrap()[0].requires_grad_(not frozen)
        opt.zero_grad()
        stats = opt.backward(losses_of(model, x, y))
        draws.append(model.calibration.sample.draws)
        assert torch.isfinite(stats.norms).all()
    assert draws == [1, 2, 2, 2, 2]


def test_draws_are_a_function_of_seed_and_count():
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    losses = (weight * torch.arange(60, dtype=torch.float64).view(20, 3)).sum(1)

    def draw(probe):
        return probe.draw(losses, [weight])[0].tolist()

    torch.manual_seed(0)
    first, second = ExactSample(5), ExactSample(5)
    found = [draw(first) for _ in range(4)]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert [draw(second) for _ in range(4)] == found
    assert torch.equal(torch.get_rng_state(), before), "the user's random numbers are not spent"
    assert len({tuple(indices) for indices in found}) == 4
    second.draws = 2
    assert draw(second) == found[2]
    assert draw(ExactSample(5, seed=1)) != found[0]
    assert draw(ExactSample(50)) == list(range(20))


def test_state_is_loaded_whole_or_not_at_all():
    model, opt = make()
    opt.backward(losses_of(model, *batch(8)))
    before = copy.deepcopy(model.calibration.state_dict())
    with pytest.raises(KeyError):
        model.calibration.load_state_dict({"draws": 9, "shared_draws": 0, "steps": 3, "factors": [{}]})
    assert_same(model.calibration.state_dict(), before)


def test_state_of_an_older_engm_is_refused_with_the_remedy():
    model, opt = make()
    opt.backward(losses_of(model, *batch(8)))
    before = copy.deepcopy(model.calibration.state_dict())
    older = {**before, "factors": {"corrected, own pass": {}}}
    with pytest.raises(ValueError, match=r"'factors' to \[\]"):
        model.calibration.load_state_dict(older)
    assert_same(model.calibration.state_dict(), before)
    model.calibration.load_state_dict({**older, "factors": []})
    assert model.calibration.state_dict()["factors"] == []
