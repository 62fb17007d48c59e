"""What the paper proves or takes for granted, checked: bounds, limits, scalings and symmetries of the weights."""

from __future__ import annotations

import copy
from math import inf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import per_example_gradients, trained
from torch import Tensor, nn
from training import (
    assert_close,
    assert_same,
    batch,
    grads,
    losses_of,
    median_norm,
    network,
    sgd,
)

import engm
from engm import ops

# Thresholds that act on these networks: about half of the examples are clipped, and the mean gradient is.
METHODS = {
    "msgd": engm.MSGD,
    "gnc": lambda model, inner: engm.GNC(model, inner, 0.5),
    "sngm": engm.SNGM,
    "fengm": lambda model, inner: engm.FENGM(model, inner, 2.0),
    "nengm": lambda model, inner: engm.NENGM(model, inner, 0.45),
    "aengm": lambda model, inner: engm.AENGM(model, inner, 5.6, tau=1),
    "engm": lambda model, inner: engm.ENGM(model, inner, 5.0),
}
every_method = pytest.mark.parametrize("method", METHODS)


def make(method, norm="group", **options):
    model = engm.GradNormModule(network(norm))
    return model, METHODS[method](model, sgd(model, **options))


def parameters_after(model, opt, x, y):
    opt.zero_grad()
    opt.backward(losses_of(model, x, y), x)
    opt.step()
    return [p.detach().clone() for p in model.parameters()]


def gradient_of(method, x, y, factor: float | Tensor = 1.0, **options):
    """``(model, optimizer, p.grad)`` after one ``backward`` of ``factor`` times the losses."""
    model, opt = make(method)
    for name, value in options.items():
        setattr(opt, name, value)
    opt.backward(losses_of(model, x, y) * factor, x)
    return model, opt, grads(model)


# -- Theorem 1 -----------------------------------------------------------------------------------------------


@st.composite
def adversarial_gradients(draw):
    """``[n, d]`` gradients as an adversary would choose them: heavy tails, outliers, two masses, all on one side."""
    n, d = draw(st.integers(2, 200)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    g = torch.randn(n, d, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["heavy", "outliers", "one-sided", "two masses", "one mass", "constant"]))
    if kind == "heavy":  # a tail exponent down to 1/5: no moment exists
        u = torch.rand(n, 1, generator=generator, dtype=torch.float64).clamp(min=1e-12)
        g = g * u ** -draw(st.floats(0.5, 5.0))
    elif kind == "outliers":
        g[: draw(st.integers(1, max(1, n // 10)))] *= 10.0 ** draw(st.integers(3, 150))
    elif kind == "one-sided":
        g = g.abs() * 10.0 ** draw(st.integers(-5, 5))
    elif kind == "two masses":  # the worst case of the bound
        g = torch.zeros_like(g)
        g[: n // 2, 0], g[n // 2 :, 0] = 1e6, -1e6
    elif kind == "one mass":  # nearly always 0, rarely enormous
        g = torch.zeros_like(g)
        g[0] = 1e9
    else:
        g = g[:1].expand(n, d).clone()
    return g + draw(st.sampled_from([0.0, 1.0, -1e4]))


@given(adversarial_gradients(), st.floats(1e-6, 1e6))
def test_theorem_1_the_variance_of_clipped_gradients_is_at_most_4_alpha_squared(g, alpha):
    """The bound holds for any distribution, and so does alpha^2: variance is at most the second moment."""
    norms, weights = ops.clip_weights(g.square().t().contiguous(), alpha)
    clipped = weights[:, None] * g
    variance = (clipped - clipped.mean(0)).square().sum(1).mean()
    assert (clipped.norm(dim=1) <= alpha * (1 + 1e-12)).all()
    assert variance <= 4 * alpha**2
    assert variance <= alpha**2 * (1 + 1e-12)
    assert_close(norms, g.norm(dim=1), rtol=1e-12)


def test_without_clipping_there_is_no_such_bound():
    """This is the other half of the argument: the test above could fail."""
    g = torch.zeros(100, 1, dtype=torch.float64)
    g[0] = 1e9
    _, weights = ops.clip_weights(g.square().t().contiguous(), inf)
    assert (weights[:, None] * g).var(correction=0) > 4e6


@pytest.mark.parametrize("norm", ["group", "none"])
@given(scales=st.lists(st.sampled_from([0.0, 1e-6, 1.0, 1e3, 1e9]), min_size=8, max_size=8), alpha=st.floats(1e-3, 1e3))
def test_theorem_1_with_the_gradients_of_a_model(norm, scales, alpha):
    """Labels or losses may be as bad as they like: here some losses are multiplied by 1e9."""
    model = engm.GradNormModule(network(norm))
    opt = engm.ENGM(model, sgd(model), alpha)
    x, y = batch()
    factors = torch.tensor(scales, dtype=torch.float64)
    exact = per_example_gradients(losses_of(model, x, y) * factors, trained(model))
    stats = opt.backward(losses_of(model, x, y) * factors)
    clipped = stats.weights[:, None] * exact.flat
    assert (clipped - clipped.mean(0)).square().sum(1).mean() <= 4 * alpha**2
    assert (clipped.norm(dim=1) <= alpha * (1 + 1e-9)).all()
    assert torch.cat([g.flatten() for g in grads(model)]).norm() <= alpha * (1 + 1e-9)


# -- weights -------------------------------------------------------------------------------------------------


@given(adversarial_gradients(), st.floats(1e-6, 1e6))
def test_weights_lie_in_0_1_and_fall_with_the_norm(g, alpha):
    norms, weights = ops.clip_weights(g.square().t().contiguous(), alpha)
    assert (weights > 0).all()
    assert (weights <= 1).all()
    ranked = weights[norms.argsort()]
    assert (ranked.diff() <= 0).all()
    assert ((weights * norms)[norms.argsort()].diff() >= -1e-12 * alpha).all(), "order among the clipped stays"


@pytest.mark.parametrize("method", ["engm", "aengm", "nengm"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_weights_of_a_model_lie_in_0_1_and_fall_with_the_norm(method, norm):
    model, opt = make(method, norm)
    for seed in range(5):
        x, y = batch(16, seed=seed)
        stats = opt.backward(losses_of(model, x, y), x)
        assert (stats.weights > 0).all()
        assert (stats.weights <= 1).all()
        positive = stats.norms > 0  # A-ENGM predicts; what is not positive has weight 1
        ranked = stats.weights[positive][stats.norms[positive].argsort()]
        assert (ranked.diff() <= 0).all()


@pytest.mark.parametrize("alpha", [1e-3, 1.0, 5.0, 100.0])
def test_f_engm_gives_every_gradient_the_norm_alpha(alpha):
    x, y = batch()
    model, opt, gradient = gradient_of("fengm", x, y, alpha=alpha)
    exact = per_example_gradients(losses_of(model, x, y), trained(model))
    assert_close(opt.stats.weights * exact.norms, torch.full((8,), alpha, dtype=torch.float64))
    assert_close(gradient, exact.mean(opt.stats.weights))


@every_method
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_permuted_batch_has_permuted_weights_and_the_same_step(method, norm):
    options = {"batch_norm": "frozen"} if norm == "batch" else {}  # the default calibrates on the first examples
    x, y = batch(9)
    found = []
    for order in (torch.arange(9), torch.randperm(9, generator=torch.Generator().manual_seed(3))):
        model = engm.GradNormModule(network(norm), **options)
        opt = METHODS[method](model, sgd(model))
        found.append((order, parameters_after(model, opt, x[order], y[order]), opt.stats))
    (_, first, before), (order, second, after) = found
    assert_close(after.weights, before.weights[order])
    assert_close(after.losses, before.losses[order])
    assert_close(second, first)


# -- limits and scalings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("method", ["engm", "nengm", "aengm"])
def test_an_infinite_threshold_is_msgd(method, norm):
    """Steps are equal to rounding, momentum and weight decay included, and every weight is exactly 1."""
    net = network(norm)
    models = [engm.GradNormModule(copy.deepcopy(net)) for _ in range(2)]
    kinds = {"engm": engm.ENGM, "nengm": engm.NENGM, "aengm": engm.AENGM}
    limit, plain = kinds[method](models[0], sgd(models[0]), inf), engm.MSGD(models[1], sgd(models[1]))
    for seed in range(4):
        x, y = batch(seed=seed)
        found, wanted = (parameters_after(model, opt, x, y) for model, opt in zip(models, (limit, plain), strict=True))
        assert_same(limit.stats.weights, torch.ones(8, dtype=torch.float64))
        assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_the_limit_is_reached_at_the_largest_norm():
    """Nothing happens between the largest norm and infinity; below, something does."""
    x, y = batch()
    _, _, plain = gradient_of("msgd", x, y)
    model, _ = make("engm")
    largest = per_example_gradients(losses_of(model, x, y), trained(model)).norms.max().item()
    _, _, above = gradient_of("engm", x, y, alpha=largest * (1 + 1e-9))
    _, opt, below = gradient_of("engm", x, y, alpha=largest * 0.999)
    assert_close(above, plain)
    assert (opt.stats.weights < 1).sum() == 1
    assert not torch.allclose(below[0], plain[0], rtol=1e-6)


@pytest.mark.parametrize("factor", [2.0**-20, 0.3, 1e4])
@pytest.mark.parametrize("method", ["engm", "nengm", "aengm", "fengm"])
def test_losses_and_threshold_times_c_are_the_same_weights_and_the_update_times_c(method, factor):
    x, y = batch()
    _, first, expected = gradient_of(method, x, y)
    _, second, found = gradient_of(method, x, y, factor, alpha=first.alpha * factor)
    assert_close(second.stats.weights, first.stats.weights)
    assert_close(second.stats.norms, first.stats.norms * factor, atol=0)
    assert_close(found, [g * factor for g in expected], atol=0)
    assert method == "fengm" or 0 < (first.stats.weights < 1).sum() < 8


@pytest.mark.parametrize("factor", [1e-3, 1e4])
def test_losses_times_c_alone(factor):
    """F-ENGM and SNGM do not notice; GNC with its threshold times c takes the step times c."""
    x, y = batch()
    _, _, expected = gradient_of("fengm", x, y)
    assert_close(gradient_of("fengm", x, y, factor)[2], expected)
    steps = {}
    for method, c in (("sngm", 1.0), ("sngm", factor), ("gnc", 1.0), ("gnc", factor)):
        model, opt = make(method, momentum=0.0, weight_decay=0.0)
        if method == "gnc":
            opt.max_norm *= c
        before = [p.detach().clone() for p in model.parameters()]
        opt.backward(losses_of(model, x, y) * c)
        opt.step()
        steps[method, c] = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    assert_close(steps["sngm", factor], steps["sngm", 1.0], rtol=1e-7)
    length = torch.cat([s.flatten() for s in steps["gnc", 1.0]]).norm()
    assert_close(length, torch.tensor(0.1 * 0.5, dtype=torch.float64), rtol=1e-7)  # lr times its threshold, which acts
    assert_close(steps["gnc", factor], [s * factor for s in steps["gnc", 1.0]], rtol=1e-7, atol=1e-9)


# -- A-ENGM where its relation is exact ----------------------------------------------------------------------


class Linear(nn.Module):
    """Logits ``W x`` with orthogonal rows of one length: ``dL/dx = W^T r``, ``dL/dW = r x^T`` with ``r = dL/dlogits``.

    So ``||dL/dW|| = ||r|| ||x|| = (||x|| / length) ||dL/dx||``: exactly linear where all inputs have one norm.
    """

    def __init__(self, length):
        super().__init__()
        rows, _ = torch.linalg.qr(torch.randn(12, 5, dtype=torch.float64))
        self.linear = nn.Linear(12, 5, bias=False, dtype=torch.float64)
        self.linear.weight.data = length * rows.t()

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("length", [0.25, 1.0, 3.0])
def test_a_engm_is_engm_where_the_relation_is_linear(length):
    net = Linear(length)
    x = torch.randn(16, 12, dtype=torch.float64)
    x = 7 * x / x.norm(dim=1, keepdim=True)
    y = torch.randint(5, (16,))
    exact, predicted = (engm.GradNormModule(copy.deepcopy(net)) for _ in range(2))
    norms = per_example_gradients(losses_of(exact, x, y), trained(exact)).norms
    alpha = (norms.min() + norms.max()).item() / 2
    engm_opt = engm.ENGM(exact, sgd(exact), alpha)
    aengm = engm.AENGM(predicted, sgd(predicted), alpha, tau=1)
    wanted = engm_opt.backward(losses_of(exact, x, y))
    found = aengm.backward(losses_of(predicted, x, y), x)
    assert_close(aengm.gamma, torch.tensor([7 / length, 0.0], dtype=torch.float64), atol=1e-9)
    assert_close(aengm.r_squared, torch.tensor(1.0, dtype=torch.float64))
    assert_close(found.norms, wanted.norms)
    assert_close(found.weights, wanted.weights)
    assert 0 < (wanted.weights < 1).sum() < 16
    assert_close(grads(predicted), grads(exact))


def test_n_engm_is_engm_with_its_threshold_over_gamma():
    """The same model: N-ENGM needs to know gamma_1, A-ENGM finds it."""
    net = Linear(2.0)
    x = torch.randn(16, 12, dtype=torch.float64)
    x = 6 * x / x.norm(dim=1, keepdim=True)
    y = torch.randint(5, (16,))
    models = [engm.GradNormModule(copy.deepcopy(net)) for _ in range(2)]
    alpha = median_norm(models[0], x, y)
    wanted = engm.ENGM(models[0], sgd(models[0]), alpha).backward(losses_of(models[0], x, y))
    naive = engm.NENGM(models[1], sgd(models[1]), alpha / 3)  # ||x|| / length
    assert_close(naive.backward(losses_of(models[1], x, y), x).weights, wanted.weights)


# -- accumulation, clipping and weight decay -----------------------------------------------------------------


@every_method
@pytest.mark.parametrize("sizes", [[3, 6], [2, 2, 2, 3], [1] * 9])
def test_micro_batches_with_a_divisor_are_one_batch(method, sizes):
    """Gradients and whole steps. A-ENGM fits on what it sees: here its coefficients are fitted before, on all of it."""
    x, y = batch(9)
    found = []
    for parts in ([9], sizes):
        model, opt = make(method)
        if method == "aengm":
            opt.backward(losses_of(model, x, y), x)
            opt.zero_grad()
            opt.tau = 1000
        weights = []
        for rows, labels in zip(x.split(parts), y.split(parts), strict=True):
            opt.backward(losses_of(model, rows, labels), rows, divisor=9)
            weights.append(opt.stats.weights)
        gradient = [g.clone() for g in grads(model)]
        opt.step()
        found.append((torch.cat(weights), gradient, [p.detach() for p in model.parameters()]))
    assert_close(found[1], found[0])
    assert method in ("msgd", "gnc", "sngm") or not torch.equal(found[0][0], torch.ones(9, dtype=torch.float64))


@every_method
def test_clip_grad_norm_acts_on_the_reweighted_mean(method):
    """Between backward and step: direction kept, length bounded, and SNGM's step does not notice."""
    x, y = batch()
    model, opt = make(method, momentum=0.0, weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    opt.backward(losses_of(model, x, y), x)
    gradient = torch.cat([g.flatten() for g in grads(model)])
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    opt.step()
    step = torch.cat([(b - p.detach()).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    length = 1.0 if method == "sngm" else 0.01
    assert_close(step, 0.1 * length * gradient / gradient.norm(), rtol=1e-3)  # torch divides by the norm plus 1e-6


def test_clip_grad_norm_at_alpha_does_nothing_after_engm():
    """A mean of gradients no longer than alpha is no longer than alpha."""
    x, y = batch()
    _, opt, gradient = gradient_of("engm", x, y)
    flat = torch.cat([g.flatten() for g in gradient])
    assert flat.norm() <= opt.alpha
    expected = [g.clone() for g in gradient]
    nn.utils.clip_grad_norm_(opt.model.parameters(), opt.alpha)
    assert_same(grads(opt.model), expected)


@every_method
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_weight_decay_is_added_to_the_reweighted_gradient(method, decay):
    """theta <- theta - lr (g + decay theta): the decay is in no norm, under no threshold, and never normalised."""
    x, y = batch()
    model, opt = make(method, momentum=0.0, weight_decay=decay)
    plain, reference = make(method, momentum=0.0, weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    found, bare = (parameters_after(m, o, x, y) for m, o in ((model, opt), (plain, reference)))
    assert_same(opt.stats.weights, reference.stats.weights)
    assert_close(found, [p - 0.1 * decay * b for p, b in zip(bare, before, strict=True)])


@every_method
def test_decoupled_weight_decay_is_the_inner_optimizers_too(method):
    x, y = batch()
    found = []
    for decay in (0.0, 0.5):
        model = engm.GradNormModule(network())
        opt = METHODS[method](model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=decay))
        before = [p.detach().clone() for p in model.parameters()]
        found.append(parameters_after(model, opt, x, y))
    assert_close(found[1], [p - 0.01 * 0.5 * b for p, b in zip(found[0], before, strict=True)])


@every_method
def test_a_gradient_scaler_changes_nothing(method):
    """The scaled gradient is unscaled before anything is made of its norm, with nobody calling ``unscale_``."""
    x, y = batch()
    found = []
    for enabled in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        model, opt = make(method)
        losses = losses_of(model, x, y)
        scaler.scale(opt.reweight(losses, x, loss_scale=scaler.get_scale()).mean()).backward()
        scaler.step(opt)
        scaler.update()
        found.append([p.detach() for p in model.parameters()])
    assert_close(found[1], found[0])
