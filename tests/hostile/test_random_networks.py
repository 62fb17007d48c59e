"""Random networks: right norms and a right step, or one clear error; the plain network's results to the bit."""

from __future__ import annotations

import copy

import torch
from engine_checks import TOLERANCE
from hostile.networks import Problem, problems
from hostile.observers import assert_same, hooks_of, outcome, state_of
from hypothesis import event, given, settings
from oracle import Truth, truth
from torch import Tensor, nn

import engm

EXAMPLES = settings.default.max_examples  # 25, or those of the profile that was asked for
FLOOR = 1e-10
MODIFIED = "was modified in place after the layer read it"  # said where torch saves less of a layer than its rule reads


def truth_of(problem: Problem, *, frozen: bool = False) -> Truth:
    x = problem.batch()
    return truth(problem.net, lambda net: problem.losses(net, x), frozen=frozen)


def assert_norms(found: engm.Measurement, expected: Truth) -> None:
    """Norms of every tensor agree; those that are truly 0 may be what a chain of normalisations makes of rounding."""
    assert list(found.names) == list(expected.gradients)
    for name, squared in found.squared_norms.items():
        error = (squared.sqrt() - expected.squared_norms[name].sqrt()).abs()
        assert bool((error <= TOLERANCE["norm, float64"] * expected.norms + FLOOR).all()), name


def assert_step(model: engm.GradNormModule, losses: Tensor, expected: Truth) -> None:
    """The gradient is that of the weighted losses, through the batch's statistics; half of the examples are clipped."""
    alpha = max(float(expected.norms.median()), 1e-3)
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha)
    weights = opt.backward(losses).weights
    wanted = expected.update(weights)
    scale = float((weights * expected.norms).mean())
    for name, parameter in model.unwrap().named_parameters():
        if parameter.requires_grad:
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert float((found - wanted[name]).norm()) <= TOLERANCE["gradient, float64"] * scale + FLOOR, name
    opt.zero_grad()


@settings(max_examples=2 * EXAMPLES)
@given(problems())
def test_norms_and_steps(problem):
    """One wrapper, several forward passes with other steps skipped: nothing of one must turn up in the next."""
    model = engm.GradNormModule(problem.net)
    exact = engm.GradNormModule(problem.net, batch_norm="exact")
    before = hooks_of(problem.net)
    for _ in problem.each_pass():
        expected = outcome(truth_of, problem)
        losses = outcome(problem.losses, model, problem.batch())
        measured = losses if isinstance(losses, Exception) else outcome(engm.measure, model, losses)
        if isinstance(expected, Exception):
            assert isinstance(measured, Exception), f"plain torch refuses: {expected}"
            continue
        if isinstance(measured, Exception):
            assert MODIFIED in str(measured)
            continue
        # A batch norm of one example alone couples nothing.
        frozen = truth_of(problem, frozen=True) if problem.couples and len(measured.norms) > 1 else expected
        assert_norms(measured, frozen)
        assert_step(model, losses, expected)
        assert_norms(engm.measure(exact, problem.losses(exact, problem.batch())), expected)
    assert hooks_of(problem.net) == before


@settings(max_examples=EXAMPLES)
@given(problems(batch_norm=False, outside=True))
def test_parameters_outside_of_layers_and_other_layouts(problem):
    """Where it is not certain what belongs to which example, the engine may say so, but not guess."""
    model = engm.GradNormModule(problem.net)
    for _ in problem.each_pass():
        expected = outcome(truth_of, problem)
        losses = outcome(problem.losses, model, problem.batch())
        measured = losses if isinstance(losses, Exception) else outcome(engm.measure, model, losses)
        if isinstance(measured, Exception):
            event(str(measured)[:60])
            assert isinstance(expected, Exception) or str(measured).startswith("engm: "), measured
            continue
        assert isinstance(expected, Truth), f"plain torch refuses: {expected}"
        assert_norms(measured, expected)
        assert_step(model, losses, expected)


@settings(max_examples=EXAMPLES)
@given(problems())
def test_plain_results_are_the_same_bits(problem):
    """Outputs, gradients, batch statistics, random numbers and refusals are those of the network without a wrapper."""
    found = []
    for wrap in (lambda net: net, engm.GradNormModule):
        net = copy.deepcopy(problem.net)
        model: nn.Module = wrap(net)
        x, refusal = problem.batch().requires_grad_(), None
        losses = outcome(problem.losses, model, x)
        if isinstance(losses, Tensor):
            refusal = outcome(losses.sum().backward)
            losses = losses.detach()
        found.append((losses, x.grad, state_of(net), torch.get_rng_state(), refusal))
    assert_same(*found)


@settings(max_examples=EXAMPLES)
@given(problems(batch_norm=False))
def test_a_step_between_forward_passes(problem):
    """Norms follow the weights: what was captured before a step has no part in what is measured after it."""
    model = engm.GradNormModule(problem.net)
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.01), 1.0)
    for _ in range(2):
        expected = outcome(truth_of, problem)
        losses = outcome(problem.losses, model, problem.batch())
        before = state_of(problem.net, opt)
        stats = losses if isinstance(losses, Exception) else outcome(opt.backward, losses)
        if isinstance(stats, Exception):
            assert isinstance(expected, Exception) or MODIFIED in str(stats)
            assert_same(state_of(problem.net, opt), before)
            return
        assert isinstance(expected, Truth), f"plain torch refuses: {expected}"
        torch.testing.assert_close(stats.norms, expected.norms, rtol=1e-9, atol=FLOOR)
        opt.step()
        opt.zero_grad()
