"""N-ENGM and A-ENGM (Alg. 1): weights from input gradients, and the regression between the two norms."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import per_example_gradients, trained
from torch import nn
from training import (
    assert_close,
    assert_same,
    backward_passes,
    batch,
    clip,
    grads,
    losses_of,
    network,
    sgd,
    snapshot,
)

import engm
from engm.optim.aengm import fit_line, predicted_weights

METHODS = [engm.NENGM, engm.AENGM]


def input_oracle(net, x, y):
    """``||dL_i/dx_i||`` of the sum of the losses, through the statistics; on a copy."""
    leaf = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses_of(copy.deepcopy(net), leaf, y).sum(), leaf)
    return gradient.flatten(1).norm(dim=1)


def exact_gradients(net, x, y):
    twin = copy.deepcopy(net)
    return per_example_gradients(losses_of(twin, x, y), trained(twin))


def least_squares(x, y):
    """Slope and intercept from torch's solver."""
    design = torch.stack([x, torch.ones_like(x)], 1).double()
    return torch.linalg.lstsq(design, y.double().unsqueeze(1)).solution.flatten()


def make(method, norm="group", alpha=0.3, n=8, **options):
    net = network(norm)
    model = engm.GradNormModule(net)
    return net, model, method(model, sgd(model, lr=0.01), alpha, **options), *batch(n)


class TestNaive:
    @pytest.mark.parametrize("norm", ["group", "batch", "none"])
    def test_weights_and_update(self, norm):
        net, model, _, x, y = make(engm.NENGM, norm)
        norms = input_oracle(net, x, y)
        opt = engm.NENGM(model, sgd(model), float(norms.median()) * 1.01)
        exact = exact_gradients(net, x, y)
        stats = opt.backward(losses_of(model, x, y), x)
        weights = clip(norms, opt.alpha)
        assert 0 < (weights < 1).sum() < 8
        assert_close(stats.input_norms, norms)
        assert_close(stats.norms, norms)
        assert_close(stats.weights, weights)
        assert_close(grads(model), exact.mean(weights))

    @pytest.mark.parametrize(("norm", "expected"), [("group", ["grad"]), ("batch", ["grad", "backward"])])
    def test_costs_no_more_passes_than_it_must(self, norm, expected):
        _, model, opt, x, y = make(engm.NENGM, norm)
        opt.backward(losses_of(model, x, y), x)
        losses = losses_of(model, x, y)
        with backward_passes() as passes:
            opt.backward(losses, x)
        assert passes == expected

    def test_norm_zero_has_weight_one(self):
        _, model, opt, x, y = make(engm.NENGM)
        losses = losses_of(model, x, y) * torch.tensor([0.0] + [1.0] * 7, dtype=torch.float64)
        stats = opt.backward(losses, x)
        assert stats.norms[0] == 0
        assert stats.weights[0] == 1

    @pytest.mark.parametrize("scale", [2.0**-7, 512.0])
    @pytest.mark.parametrize("norm", ["group", "batch"])
    @pytest.mark.parametrize("call", ["backward", "reweight"])
    def test_loss_scale_leaves_weights_alone(self, norm, scale, call):
        _, model, opt, x, y = make(engm.NENGM, norm)
        opt.backward(losses_of(model, x, y), x)
        expected = opt.stats.weights
        _, model, opt, x, y = make(engm.NENGM, norm)
        getattr(opt, call)(losses_of(model, x, y), x, loss_scale=scale)
        assert_close(opt.stats.weights, expected)

    def test_not_finite(self):
        _, model, opt, x, y = make(engm.NENGM)
        losses = losses_of(model, x, y) * torch.tensor([torch.nan] + [1.0] * 7, dtype=torch.float64)
        stats = opt.backward(losses, x, check=False)
        assert torch.isnan(stats.weights).tolist() == [True] + [False] * 7
        assert all(torch.isnan(g).any() for g in grads(model))


class TestInputs:
    """Which tensor's gradient is read (design section 3)."""

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("call", ["backward", "reweight"])
    def test_the_very_tensor_the_wrapper_saw_or_one_that_requires_grad(self, method, call):
        net, model, opt, x, y = make(method)
        norms = input_oracle(net, x, y)
        getattr(opt, call)(losses_of(model, x, y), x)
        assert_close(opt.stats.input_norms, norms)
        assert not x.requires_grad
        leaf = x.clone().requires_grad_()
        getattr(opt, call)(losses_of(model, leaf, y), leaf)
        assert_close(opt.stats.input_norms, norms)
        assert leaf.grad is None

    def test_a_tensor_on_the_way_will_do(self):
        net, model, opt, x, y = make(engm.NENGM)
        delta = torch.zeros_like(x, requires_grad=True)
        adversarial = x + delta
        stats = opt.backward(losses_of(model, adversarial, y), adversarial)
        assert_close(stats.input_norms, input_oracle(net, x, y))

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("norm", ["group", "batch"])
    @pytest.mark.parametrize("call", ["backward", "reweight"])
    @pytest.mark.parametrize(
        ("inputs", "error", "message"),
        [
            (lambda x: None, ValueError, "opt.backward\\(losses, inputs=x_adv\\)"),
            (lambda x: x.clone(), ValueError, "inputs.requires_grad_\\(\\)"),
            (lambda x: x.clone().requires_grad_(), ValueError, "losses do not depend on inputs"),
            (lambda x: "x", TypeError, "inputs must be a tensor or a tuple of tensors"),
            (lambda x: (), ValueError, "inputs"),
            (lambda x: 3, TypeError, "inputs must be a tensor"),
        ],
        ids=["none", "copy", "detached", "text", "empty", "number"],
    )
    def test_anything_else_is_one_clear_error(self, method, norm, call, inputs, error, message):
        _, model, opt, x, y = make(method, norm)
        losses = losses_of(model, x, y)
        before = snapshot(opt)
        with pytest.raises(error, match=message):
            getattr(opt, call)(losses, inputs(x))
        assert_same(snapshot(opt), before)

    def test_a_perturbation_shared_by_the_batch_has_no_gradient_an_example(self):
        _, model, opt, x, y = make(engm.NENGM)
        delta = torch.zeros(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)
        with pytest.raises(ValueError, match="inputs must have the 8 examples along their first dimension"):
            opt.backward(losses_of(model, x + delta, y), delta)

    @pytest.mark.parametrize("given", [tuple, list])
    def test_several_inputs_count_together(self, given):
        torch.manual_seed(0)
        net = TwoInputs().double()
        model = engm.GradNormModule(net)
        opt = engm.NENGM(model, sgd(model), 0.1)
        a, b = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, 3, dtype=torch.float64)
        y = torch.arange(6) % 5
        leaves = [t.clone().requires_grad_() for t in (a, b)]
        ga, gb = torch.autograd.grad(F.cross_entropy(net(*leaves), y, reduction="sum"), leaves)
        losses = F.cross_entropy(model(a, b=b), y, reduction="none")
        stats = opt.backward(losses, given([a, b]))
        assert_close(stats.input_norms, (ga.square().sum(1) + gb.square().sum((1, 2))).sqrt())


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(6, 5)

    def forward(self, a, b):
        return torch.tanh(self.a(a)) + self.b(b.flatten(1))


class Amplitude(nn.Module):
    """``L_i = (w . x_i) s_i``: with unit ``x_i``, ``||dL/dw|| = s_i`` and ``||dL/dx|| = ||w|| s_i``, a line exactly."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1, bias=False).double()

    def forward(self, x):
        return self.linear(x).squeeze(1)


class TestRegression:
    def test_exact_where_the_relation_is_a_line(self):
        """tau = 1 on a network whose two norms are proportional gives ENGM's weights."""
        torch.manual_seed(0)
        net = Amplitude()
        x = F.normalize(torch.randn(9, 4, dtype=torch.float64), dim=1)
        scale = torch.linspace(0.3, 3, 9, dtype=torch.float64)
        model = engm.GradNormModule(net)
        exact = engm.ENGM(model, sgd(model, lr=0.0), 1.2)
        fitted = engm.AENGM(model, sgd(model, lr=0.0), 1.2, tau=1)
        wanted = exact.backward(model(x) * scale)
        expected = [g.clone() for g in grads(model)]
        for _ in range(3):
            exact.zero_grad()
            stats = fitted.backward(model(x) * scale, x)
            assert_close(
                fitted.gamma, torch.tensor([1 / float(net.linear.weight.detach().norm()), 0.0], dtype=torch.float64)
            )
            assert_close(stats.weights, wanted.weights)
            assert_close(grads(model), expected)
        assert fitted.fits == 3
        assert_close(fitted.r_squared, torch.ones((), dtype=torch.float64))

    @pytest.mark.parametrize("first", [False, True], ids=["whole", "averaged"])
    def test_schedule_and_smoothing(self, first):
        net, model, opt, _, _ = make(engm.AENGM, alpha=5.0, tau=3, beta_gamma=0.6, average_first_fit=first)
        gamma = torch.tensor([1.0, 0.0], dtype=torch.float64)
        for step in range(8):
            x, y = batch(8, seed=step)
            found = input_oracle(net, x, y)
            if step % 3 == 0:
                fresh = least_squares(found, exact_gradients(net, x, y).norms)
                gamma = fresh if step == 0 and not first else 0.6 * gamma + 0.4 * fresh
            stats = opt.backward(losses_of(model, x, y), x)
            predicted = gamma[0] * found + gamma[1]
            assert_close(opt.gamma, gamma, rtol=1e-8)
            assert_close(stats.norms, predicted, rtol=1e-8)
            assert_close(stats.weights, torch.where(predicted > 5, 5 / predicted, 1.0), rtol=1e-8)
            opt.step()
            opt.zero_grad()
        assert opt.fits == 3

    def test_norms_are_not_asked_for_between_regressions(self):
        _, model, opt, x, y = make(engm.AENGM, "batch", tau=3)
        counts = []
        for _ in range(6):
            losses = losses_of(model, x, y)
            with backward_passes() as passes:
                opt.backward(losses, x)
            counts.append(passes.count("grad"))
            assert passes[-1] == "backward"
        # inputs, norms; the first also a strict check and a calibration
        assert counts[1:] == [1, 1, 2, 1, 1]

    @pytest.mark.parametrize("call", ["backward", "reweight"])
    def test_training_mode_batch_norm(self, call):
        net, model, opt, x, y = make(engm.AENGM, "batch")
        twin = engm.GradNormModule(copy.deepcopy(net))
        opt_engm = engm.ENGM(twin, sgd(twin), 0.3)
        norms = opt_engm.backward(losses_of(opt_engm.model, x, y)).norms
        found = input_oracle(net, x, y)
        getattr(opt, call)(losses_of(model, x, y), x)
        assert_close(opt.stats.input_norms, found)
        assert_close(opt.gamma, least_squares(found, norms))

    def test_exact_mode_regresses_exact_norms(self):
        net = network("batch")
        model = engm.GradNormModule(net, batch_norm="exact")
        opt = engm.AENGM(model, sgd(model), 0.3)
        x, y = batch(8)
        expected = least_squares(input_oracle(net, x, y), exact_gradients(net, x, y).norms)
        opt.backward(losses_of(model, x, y), x)
        assert_close(opt.gamma, expected)

    def test_micro_batches_and_reweighting_agree(self):
        _, model, opt, x, y = make(engm.AENGM)
        opt.backward(losses_of(model, x, y), x)
        expected = [g.clone() for g in grads(model)]
        _, model, opt, x, y = make(engm.AENGM)
        opt.reweight(losses_of(model, x, y), x).mean().backward()
        assert_close(grads(model), expected)


class TestDegenerateFits:
    def test_inputs_all_alike(self):
        _net, model, opt, x, y = make(engm.AENGM, tau=1)
        opt.backward(losses_of(model, x, y), x)
        gamma = opt.gamma.clone()
        same, label = x[:1].expand(8, -1, -1, -1).clone(), y[:1].expand(8)
        stats = opt.backward(losses_of(model, same, label), same)
        assert_same(opt.gamma, gamma)
        assert (int(opt.fits), int(opt.failed_fits)) == (1, 1)
        assert torch.isfinite(stats.weights).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_inputs_alike_but_for_rounding(self, dtype):
        x = torch.full((32,), 0.7, dtype=dtype) * (1 + torch.linspace(-2, 2, 32, dtype=dtype) * torch.finfo(dtype).eps)
        assert len(x.unique()) > 1
        assert not fit_line(x, torch.rand(32, dtype=dtype))[2]
        assert fit_line(x + torch.linspace(0, 1e-3, 32, dtype=dtype), x)[2]

    def test_not_finite(self):
        _, model, opt, x, y = make(engm.AENGM, tau=1)
        opt.backward(losses_of(model, x, y), x)
        gamma = opt.gamma.clone()
        bad = torch.tensor([1.0, torch.nan] + [1.0] * 6, dtype=torch.float64)
        stats = opt.backward(losses_of(model, x, y) * bad, x, check=False)
        assert_same(opt.gamma, gamma)
        assert int(opt.failed_fits) == 1
        assert torch.isnan(stats.weights).tolist() == [False, True] + [False] * 6
        assert all(torch.isnan(g).any() for g in grads(model))

    def test_one_example_cannot_be_fitted(self):
        _, model, opt, x, y = make(engm.AENGM, n=1)
        opt.backward(losses_of(model, x, y), x)
        assert (int(opt.fits), int(opt.failed_fits)) == (0, 1)
        assert opt.gamma.tolist() == [1.0, 0.0]
        assert opt.needs_norms, "a first fit is tried again until there is one"
        more, labels = batch(8, seed=1)
        opt.backward(losses_of(model, more.requires_grad_(), labels), more)
        assert (int(opt.fits), opt.needs_norms) == (1, False)

    def test_the_first_is_tried_again_where_numbers_overflow(self):
        """As at the first steps under a loss scale that is too large yet; later ones leave the coefficients."""
        _, model, opt, x, y = make(engm.AENGM, tau=3)
        bad = torch.tensor([1.0, torch.inf] + [1.0] * 6, dtype=torch.float64)
        fits = []
        for overflows in (True, True, False, False, False, True, False, False, False):
            opt.backward(losses_of(model, x, y) * (bad if overflows else 1), x, check=False)
            opt.zero_grad()
            fits.append((int(opt.fits), int(opt.failed_fits)))
        assert fits == [(0, 1), (0, 2)] + [(1, 2)] * 3 + [(1, 3)] * 3 + [(2, 3)]

    def test_and_after_a_checkpoint(self):
        _, model, opt, x, y = make(engm.AENGM, tau=3)
        opt.backward(losses_of(model, x, y) * torch.inf, x, check=False)
        opt.zero_grad()
        _, again, other, _, _ = make(engm.AENGM, tau=3)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        other.backward(losses_of(again, x, y), x)
        assert int(other.fits) == 1

    def test_first_usable_fit_is_taken_whole(self):
        net, model, opt, x, y = make(engm.AENGM, tau=1)
        single = x[:1].clone()
        opt.backward(losses_of(model, single, y[:1]), single)
        opt.backward(losses_of(model, x, y), x)
        assert_close(opt.gamma, least_squares(input_oracle(net, x, y), exact_gradients(net, x, y).norms))

    def test_predictions_that_are_not_positive_give_weight_one_and_are_counted(self):
        _, model, opt, x, y = make(engm.AENGM, tau=100)
        opt.backward(losses_of(model, x, y), x)
        found = opt.stats.input_norms
        opt.gamma = torch.tensor([1.0, -float(found.sort().values[2])], dtype=torch.float64)
        stats = opt.backward(losses_of(model, x, y), x)
        assert stats.weights[found.argsort()[:3]].tolist() == [1.0] * 3
        assert int(opt.fallbacks) == 3

    def test_weights_of_a_prediction(self):
        predicted = torch.tensor([2.0, 0.5, 0.0, -1.0, torch.inf, -torch.inf, torch.nan])
        assert_same(predicted_weights(predicted, 1.0), torch.tensor([0.5, 1, 1, 1] + [torch.nan] * 3))
        assert_same(predicted_weights(predicted[:4], float("inf")), torch.ones(4))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"tau": 0}, "tau"),
        ({"tau": 2.5}, "tau"),
        ({"beta_gamma": 1.0}, "beta_gamma"),
        ({"beta_gamma": -0.1}, "beta_gamma"),
        ({"beta_gamma": float("nan")}, "beta_gamma"),
        ({"beta_gamma": "half"}, "beta_gamma"),
        ({"alpha": 0.0}, "alpha"),
    ],
)
def test_options_out_of_range(options, name):
    model = engm.GradNormModule(network())
    with pytest.raises(ValueError, match=name):
        engm.AENGM(model, sgd(model), **{"alpha": 1.0, **options})


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: F.conv1d(x, w.view(3, 2, 2)).flatten(1),
        lambda x, w: F.conv1d(x, w.view(3, 2, 2)).flatten(1) + F.conv1d(x, 2 * w.view(3, 2, 2)).flatten(1),
        lambda x, w: (x.mT @ w.view(2, 6)).flatten(1),
    ],
    ids=["convolution", "two convolutions", "product"],
)
def test_parameters_that_enter_where_the_inputs_do(use):
    """What the node there saved is read when the pass, which goes on to the inputs, is over."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12))

        def forward(self, x):
            return torch.tanh(use(x, self.weight)).sum(1)

    model = engm.GradNormModule(Net().double())
    opt = engm.AENGM(model, torch.optim.SGD(model.parameters(), 0.1), alpha=0.1)
    for _ in range(2):
        x = torch.randn(4, 2, 5, dtype=torch.float64, requires_grad=True)
        losses = model(x).square()
        gradients = [torch.autograd.grad(loss, model.weight, retain_graph=True)[0] for loss in losses]
        opt.zero_grad()
        stats = opt.backward(losses, inputs=x)
        wanted = sum(w * g for w, g in zip(stats.weights, gradients, strict=True)) / 4
        torch.testing.assert_close(model.weight.grad, wanted)
