"""Borrowed norms are judged when they are calibrated, and a step takes its own where they are too far off."""

from __future__ import annotations

import copy
from functools import partial
from math import inf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import per_example_gradients, relative, trained
from torch import nn
from training import assert_same, batch, losses_of, median_norm, network, sgd

import engm
from engm.adversarial import PGD
from engm.batch_norm.calibration import MOST_ERROR, Calibration
from engm.batch_norm.factors import FactorKey

BORROWED, LENT = FactorKey("plain", True), FactorKey("frozen", True)  # by running statistics, by the batch's
OWN = FactorKey("corrected", False)


def lagging(net: nn.Module, far: float) -> nn.Module:
    """The network with running statistics that are ``far`` times a random draw away from where they were."""
    torch.manual_seed(4)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += far * torch.randn_like(module.running_mean)
            module.running_var *= (far * torch.randn_like(module.running_var)).exp()
    return net


def settled(net: nn.Module, x: torch.Tensor) -> nn.Module:
    """The network with the batch's own statistics as running statistics."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    net(x)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return net


def measured_in_evaluation_mode(model, x, y, inputs=True):
    model.eval()
    adversarial = x.clone().requires_grad_()
    found = engm.measure(model, losses_of(model, adversarial, y), adversarial if inputs else None)
    model.train()
    return found


def even_batch(n):
    """Examples of one length, whose norms the statistics of the batch change alike."""
    x, y = batch(n)
    return x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * 5, y


def made(far, method=engm.ENGM, n=16, **options):
    x, y = even_batch(n)
    net = lagging(settled(network("batch"), x), far)
    model = engm.GradNormModule(net, **options)
    return model, method(model, sgd(model, lr=0.01), median_norm(model, x, y)), x, y


@given(st.integers(2, 17), st.integers(1, 5), st.integers(0, 2**20))
def test_judged_error_is_that_of_weights_by_factors_from_the_other_half(k, tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(k, tensors, generator=generator, dtype=torch.float64)
    parameters = [(f"p{i}", nn.Parameter(torch.ones((), dtype=torch.float64))) for i in range(tensors)]
    losses = sum(scales[:, i] * p for i, (_, p) in enumerate(parameters))
    exact = scales.square().T
    measured = torch.rand(tensors, k, generator=generator, dtype=torch.float64) + 0.1
    calibration = Calibration(50, k)
    calibration.factors(LENT, measured, losses, parameters, count=True)
    errors = []
    for i in range(k):  # all are drawn, in their order
        others = [j for j in range(k) if j % 2 != i % 2]
        factor = []
        for row in range(tensors):
            top = sum(exact[row, j] / exact[:, j].sum() for j in others)
            factor.append(top / sum(measured[row, j] / exact[:, j].sum() for j in others))
        mapped = sum(f * m for f, m in zip(factor, measured[:, i], strict=True)).sqrt()
        errors.append(abs(exact[:, i].sum().sqrt() / mapped - 1))
    (error,) = calibration.judged_errors().values()
    want = sum(errors) / k
    assert relative(error, want) <= 1e-12
    assert calibration.faithful(LENT) == bool(want <= MOST_ERROR)


@given(st.integers(2, 9), st.integers(1, 4), st.floats(0.2, 5), st.integers(0, 2**20))
def test_factors_are_judged_by_how_those_before_them_served(k, tensors, drift, seed):
    """The larger of two errors counts: that of the halves, and that of the last factors on today's examples."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [(f"p{i}", nn.Parameter(torch.ones((), dtype=torch.float64))) for i in range(tensors)]
    calibration, alone = Calibration(1, k), Calibration(1, k)
    for step in range(2):
        scales = torch.rand(k, tensors, generator=generator, dtype=torch.float64) + 0.5
        exact = scales.square().T
        measured = exact * (1 + 0.1 * torch.rand(tensors, k, generator=generator, dtype=torch.float64)) * drift**step
        losses = sum(scales[:, i] * p for i, (_, p) in enumerate(parameters))
        if step == 1:
            mapped = (measured * calibration.carried()[BORROWED].unsqueeze(1)).sum(0)
            served = ((exact.sum(0) / mapped).sqrt() - 1).abs().mean()
            alone.factors(BORROWED, measured, losses, parameters, count=True)
        calibration.factors(BORROWED, measured, losses, parameters, count=True)
        calibration.advance()
        assert calibration.faithful(BORROWED) <= step  # not before the first were seen to serve
    want = torch.maximum(alone.judged_errors()[BORROWED], served)
    assert relative(calibration.judged_errors()[BORROWED], want) <= 1e-12
    assert calibration.faithful(BORROWED) == bool(want <= MOST_ERROR)
    assert alone.judged_errors()[BORROWED] < MOST_ERROR
    again = Calibration(1, k)
    again.load_state_dict(copy.deepcopy(calibration.state_dict()))
    assert again.verdicts() == calibration.verdicts()


def test_norms_of_the_steps_own_mode_are_used_from_the_first_step():
    parameter = nn.Parameter(torch.ones((), dtype=torch.float64))
    scales = torch.rand(16, dtype=torch.float64) + 1
    for key, found in ((BORROWED, False), (LENT, True)):
        calibration = Calibration(50, 16)
        calibration.factors(key, 2 * scales.square()[None], scales * parameter, [("p", parameter)], count=True)
        assert calibration.judged_errors()[key] < 1e-12
        assert calibration.faithful(key) == found
        calibration.most_error = inf
        assert reloaded(calibration).faithful(key)


def reloaded(calibration):
    again = Calibration(calibration.every, calibration.sample.examples)
    again.most_error = calibration.most_error
    again.load_state_dict(calibration.state_dict())
    return again


@pytest.mark.parametrize(("noise", "worth_a_pass"), [(0.1, True), (0.5, True), (0.95, False), (2.0, False)])
def test_a_pass_of_ones_own_has_to_be_better_by_a_quarter(noise, worth_a_pass):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.ones((), dtype=torch.float64))
    scales, off = torch.rand(16, dtype=torch.float64) + 1, 0.3 * torch.randn(1, 16, dtype=torch.float64)
    calibration = Calibration(1, 16)

    def judge(key, by):
        measured = scales.square() * (1 + by * off).square()
        calibration.factors(key, measured, scales * parameter, [("p", parameter)], count=True)

    judge(LENT, 1.0)
    assert not calibration.faithful(LENT)  # nothing is known of a pass of one's own
    judge(OWN, noise)
    errors = calibration.judged_errors()
    assert errors[LENT] > MOST_ERROR
    assert calibration.faithful(LENT) != worth_a_pass == bool(errors[OWN] < 0.75 * errors[LENT])
    again = Calibration(1, 16)
    again.load_state_dict(copy.deepcopy(calibration.state_dict()))
    assert again.verdicts() == calibration.verdicts() == ((LENT, not worth_a_pass),)
    calibration.advance()
    judge(LENT, 1.0)  # what is known of a pass of one's own is older now
    assert not calibration.faithful(LENT)


def test_one_example_cannot_be_judged():
    parameter = nn.Parameter(torch.ones(2).double())
    calibration = Calibration(50, 1)
    losses = (parameter * torch.ones(4, 2)).sum(1)
    calibration.factors(BORROWED, torch.ones(1, 4).double(), losses, [("p", parameter)], count=True)
    assert calibration.judged_errors() == {}
    assert calibration.faithful(BORROWED)


@pytest.mark.parametrize("method", [engm.ENGM, engm.FENGM])
def test_a_step_takes_its_own_norms_where_borrowed_ones_are_far_off(method):
    model, opt, x, y = made(far=2.0, method=method)
    twin_model, twin, _, _ = made(far=2.0, method=method)
    stats = opt.backward(losses_of(model, x, y), measurement=measured_in_evaluation_mode(model, x, y))
    assert stats.source == "own"
    assert model.calibration.judged_errors()[BORROWED] > MOST_ERROR
    twin_model.calibration.sample.draws = 1  # the first draw went to the factors that were judged
    own = twin.backward(losses_of(twin_model, x, y))
    assert own.source == "own"
    assert_same([stats.norms, stats.weights], [own.norms, own.weights])


@pytest.mark.parametrize("method", [engm.ENGM, engm.FENGM, engm.AENGM])
def test_and_uses_those_that_are_not_once_their_factors_have_been_seen_to_keep(method):
    model, opt, x, y = made(far=0.0, method=method, calibrate_every=1)
    for source in ("own", "borrowed"):
        stats = opt.backward(losses_of(model, x, y), measurement=measured_in_evaluation_mode(model, x, y))
        opt.zero_grad()
        assert stats.source == source
    assert model.calibration.judged_errors()[BORROWED] <= MOST_ERROR


def test_a_verdict_holds_until_factors_are_taken_again():
    model, opt, x, y = made(far=2.0, calibrate_every=3)
    sources = []
    for step in range(9):
        if step == 1:  # from here on the attack sees statistics that are right
            settled(model.unwrap(), x)
        stats = opt.backward(losses_of(model, x, y), measurement=measured_in_evaluation_mode(model, x, y))
        sources.append(stats.source)
        opt.zero_grad()
    # Factors of step 0 are seen to have served badly at step 3, those of step 3 to have served well at step 6.
    assert sources == ["own"] * 6 + ["borrowed"] * 3


def test_statistics_that_run_away_between_calibrations():
    """Fresh factors map norms of statistics that ran away well, each time, and those before them badly."""
    model, opt, x, y = made(far=0.0, calibrate_every=2)
    net = settled(model.unwrap(), x)
    errors, sources = [], []
    for _ in range(12):
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0  # nobody but this test moves them
                module.running_var *= 2.0
        losses = losses_of(model, x, y)
        twin = copy.deepcopy(net)
        exact = per_example_gradients(losses_of(twin, x, y), trained(twin)).norms
        stats = opt.backward(losses, measurement=measured_in_evaluation_mode(model, x, y))
        errors.append(float((exact / stats.norms - 1).abs().mean()))
        sources.append(stats.source)
        opt.zero_grad()
    assert max(errors) <= 0.1, errors
    assert sources == ["own"] * 12


def test_a_verdict_is_part_of_the_state():
    model, opt, x, y = made(far=2.0)
    opt.backward(losses_of(model, x, y), measurement=measured_in_evaluation_mode(model, x, y))
    opt.step()
    opt.zero_grad()
    other_model, other, _, _ = made(far=2.0)
    other_model.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    found = []
    for m, o in ((model, opt), (other_model, other)):
        stats = o.backward(losses_of(m, x, y), measurement=measured_in_evaluation_mode(m, x, y))
        found.append((stats.source, stats.norms))
    assert_same(found[1], found[0])
    assert found[0][0] == "own"


def test_a_state_without_verdicts_is_read():
    model, opt, x, y = made(far=2.0)
    opt.backward(losses_of(model, x, y), measurement=measured_in_evaluation_mode(model, x, y))
    state = opt.state_dict()
    for entry in state["engm"]["calibration"]["factors"]:
        del entry["error"], entry["kept"]
    opt.load_state_dict(state)
    stats = opt.backward(losses_of(model, x, y), measurement=measured_in_evaluation_mode(model, x, y))
    assert stats.source == "borrowed"


@pytest.mark.parametrize("method", [engm.MSGD, engm.NENGM])
def test_who_reads_no_gradient_norms_judges_nothing(method):
    x, y = batch(16)
    model = engm.GradNormModule(lagging(settled(network("batch"), x), 2.0))
    opt = method(model, sgd(model), *([0.1] if method is engm.NENGM else []))
    stats = opt.backward(losses_of(model, x, y), measurement=measured_in_evaluation_mode(model, x, y))
    assert stats.source == ("borrowed" if method is engm.NENGM else None)
    assert model.calibration.judged_errors() == {}


def test_where_nothing_couples_nothing_is_judged():
    x, y = batch(8)
    model = engm.GradNormModule(network("group"))
    opt = engm.ENGM(model, sgd(model), 0.5)
    stats = opt.backward(losses_of(model, x, y), measurement=measured_in_evaluation_mode(model, x, y))
    assert stats.source == "borrowed"
    assert model.calibration.judged_errors() == {}


@pytest.mark.parametrize("method", [engm.ENGM, engm.AENGM])
def test_an_attack_measures_no_norms_that_a_step_will_not_use(method):
    """But those by which borrowed norms are judged anew; figures and updates are those of measuring at every step."""
    attack = PGD(0.02, 0.01, 2, random_start=False)

    def steps(measure):
        model, opt, x, y = made(far=2.0, calibrate_every=3, method=method)
        x = (x - x.min()) / (x.max() - x.min())
        taken, found = [], []
        for step in range(9):
            model.calibration.most_error = 0.0 if step < 5 else inf  # and is judged by it at steps 0, 3 and 6
            adversarial = attack(model, x, y, measure=opt if measure is None else measure)
            taken.append(adversarial.measurement is not None and adversarial.measurement.stacked is not None)
            at = adversarial.inputs.requires_grad_()
            stats = opt.backward(losses_of(model, at, y), inputs=at, measurement=adversarial.measurement)
            found.append((stats.source, stats.weights))
            opt.step()
            opt.zero_grad()
        return taken, [source for source, _ in found], [weights for _, weights in found]

    taken, sources, weights = steps(None)
    always, twin_sources, twin_weights = steps(True)
    assert all(always)
    assert_same(weights, twin_weights)
    if method is engm.AENGM:  # which borrows input gradients at every step, and regresses at the first of fifty
        assert taken == [True] + [False] * 8
        return
    assert sources == twin_sources
    assert sources == ["own"] * 6 + ["borrowed"] * 3
    assert taken == [True, False, False] * 2 + [True] * 3


class Branch(nn.Module):
    """Batch norms on the way of every step, and in one of two branches that steps take in turn."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2))
            for _ in range(2)
        )
        self.last = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5))
        self.which = 0

    def forward(self, x):
        return self.last(self.branches[self.which](self.stem(x)))


@pytest.mark.parametrize("borrowed", [False, True])
def test_two_branches_in_turn(borrowed):
    """Factors are taken of the branch that a step takes, and kept while it is not taken."""
    x, y = even_batch(24)
    net = Branch().double()
    for net.which in (0, 1, 0):
        settled(net, x)
    model = engm.GradNormModule(net, calibrate_every=100, calibrate_examples=24)
    model.calibration.most_error = inf
    opt = engm.ENGM(model, sgd(model, lr=1e-9), 1.0)
    for step in range(6):
        net.which = step % 2
        exact = engm.naive_grad_norms(model, losses_of(model, x, y))
        measurement = measured_in_evaluation_mode(model, x, y) if borrowed else None
        stats = opt.backward(losses_of(model, x, y), measurement=measurement)
        assert float((stats.norms / exact - 1).abs().mean()) <= (0.2 if borrowed else 0.05)
        opt.zero_grad()
    assert model.calibration.sample.draws == 2


def test_residual_blocks_that_begin_at_0():
    """Nothing in such a block has a gradient at the first step, at which factors are taken."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            conv = partial(nn.Conv2d, 6, 6, 3, padding=1, bias=False)
            self.inner = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU(), conv(), nn.BatchNorm2d(6))
            nn.init.zeros_(self.inner[-1].weight)

        def forward(self, x):
            return torch.relu(x + self.inner(x))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), Block(), Block(), nn.Flatten(), nn.Linear(96, 5))
    x, y = even_batch(24)
    net.double()
    model = engm.GradNormModule(net, calibrate_examples=24)
    opt = engm.ENGM(model, sgd(model, lr=0.05), 1.0)
    draws = []
    for _ in range(6):
        losses = losses_of(model, x, y)
        exact = per_example_gradients(losses, trained(net)).squared_norms
        stats = opt.backward(losses)
        assert float((stats.norms / sum(exact.values()).sqrt() - 1).abs().mean()) <= 0.03
        draws.append(model.calibration.sample.draws)
        opt.step()
        opt.zero_grad()
    assert draws == [1] + [2] * 5
    assert model.calibration.missing() == ((OWN, ()),)


def test_most_examples_have_no_gradient():
    """Those that have are judged alone."""
    x, y = batch(32)
    model = engm.GradNormModule(lagging(settled(network("batch"), x), 2.0), calibrate_examples=4)
    opt = engm.ENGM(model, sgd(model, lr=1e-9), 1.0)
    few = torch.arange(32) % 8 == 3

    def losses():
        return losses_of(model, x, y) * few

    model.eval()
    measurement = engm.measure(model, losses())
    model.train()
    assert opt.backward(losses(), measurement=measurement).source == "own"
    assert model.calibration.judged_errors()[BORROWED] > MOST_ERROR
    assert model.calibration.judged_errors()[OWN] > 0
