"""ENGM: weights and gradient against one backpropagation an example, in float64."""

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
    median_norm,
    network,
    sgd,
)

import engm


def oracle(net, x, y, alpha, divisor=None):
    """``(weights, norms, gradient)`` of Eq. 5 by the loop, on a copy of the network."""
    net = copy.deepcopy(net)
    exact = per_example_gradients(losses_of(net, x, y), trained(net))
    norms = exact.norms
    weights = clip(norms, alpha)
    return weights, norms, exact.mean(weights, divisor)


def make(norm="group", alpha=None, n=8, train=True, **options):
    net = network(norm).train(train)
    x, y = batch(n)
    model = engm.GradNormModule(net, **options)
    alpha = median_norm(model, x, y) if alpha is None else alpha
    return net, model, engm.ENGM(model, sgd(model), alpha), x, y


class TestIndependentExamples:
    @pytest.mark.parametrize("norm", ["group", "none", "batch"])
    @pytest.mark.parametrize("n", [1, 7])
    def test_update_is_the_mean_of_clipped_gradients(self, norm, n):
        net, model, opt, x, y = make(norm, n=n, train=False)
        weights, norms, gradient = oracle(net, x, y, opt.alpha)
        stats = opt.backward(losses_of(model, x, y))
        assert_close(stats.norms, norms)
        assert_close(stats.weights, weights)
        assert_close(grads(model), gradient)
        assert n == 1 or 0 < (weights < 1).sum() < n, "the case must clip some examples and not others"

    def test_one_backward_pass_does_it(self):
        _, model, opt, x, y = make()
        opt.backward(losses_of(model, x, y))  # the strict check has a pass of its own, once
        losses = losses_of(model, x, y)
        with backward_passes() as passes:
            opt.backward(losses)
        assert passes == ["grad"]

    def test_reports_what_it_did(self):
        _net, model, opt, x, y = make()
        losses = losses_of(model, x, y)
        stats = opt.backward(losses)
        assert stats is opt.stats
        assert_same(stats.losses, losses.detach())
        assert stats.input_norms is None
        assert not any(t.requires_grad for t in (stats.losses, stats.weights, stats.norms))

    def test_adds_to_gradients(self):
        net, model, opt, x, y = make()
        _, _, gradient = oracle(net, x, y, opt.alpha)
        before = [torch.randn_like(p) for p in model.parameters()]
        for parameter, grad in zip(model.parameters(), before, strict=True):
            parameter.grad = grad.clone()
        held = grads(model)
        opt.backward(losses_of(model, x, y))
        assert_close(grads(model), [b + g for b, g in zip(before, gradient, strict=True)])
        assert all(now is then for now, then in zip(grads(model), held, strict=True)), "added in place, as torch does"

    def test_micro_batches_are_one_batch(self):
        net, model, opt, x, y = make(n=9)
        _, _, gradient = oracle(net, x, y, opt.alpha)
        for rows in (slice(0, 4), slice(4, 8), slice(8, 9)):
            opt.backward(losses_of(model, x[rows], y[rows]), divisor=9)
        assert_close(grads(model), gradient)

    def test_order_of_the_batch_does_not_matter(self):
        _net, model, opt, x, y = make()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
        first = opt.backward(losses_of(model, x, y))
        expected = [g.clone() for g in grads(model)]
        opt.zero_grad()
        second = opt.backward(losses_of(model, x[order], y[order]))
        assert_close(second.weights, first.weights[order])
        assert_close(grads(model), expected)

    @pytest.mark.parametrize("norm", ["group", "batch"])
    @pytest.mark.parametrize("scale", [2.0**-7, 1000.0])
    def test_loss_scale_scales_the_gradient_and_not_the_weights(self, norm, scale):
        _, model, opt, x, y = make(norm)
        first = opt.backward(losses_of(model, x, y))
        expected = [g * scale for g in grads(model)]
        _, model, opt, x, y = make(norm)
        second = opt.backward(losses_of(model, x, y), loss_scale=scale)
        assert_close(second.weights, first.weights)
        assert_close(second.norms, first.norms)
        assert_close(grads(model), expected)

    def test_frozen_parameters_have_no_part(self):
        net, _, _, x, y = make()
        net[0].requires_grad_(False)
        net[4].bias.requires_grad_(False)
        model = engm.GradNormModule(net)
        alpha = median_norm(model, x, y)
        opt = engm.ENGM(model, torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1), alpha)
        weights, _, gradient = oracle(net, x, y, alpha)
        stats = opt.backward(losses_of(model, x, y))
        assert_close(stats.weights, weights)
        assert_close(grads(model), gradient)
        assert [net[0].weight.grad, net[0].bias.grad, net[4].bias.grad] == [None] * 3

    def test_frozen_after_the_forward_pass(self):
        net, model, opt, x, y = make()
        losses = losses_of(model, x, y)
        net[0].requires_grad_(False)
        opt.backward(losses)
        assert net[0].weight.grad is None
        _, norms, gradient = oracle(net, x, y, opt.alpha)
        assert_close(opt.stats.norms, norms)
        assert_close(grads(model), gradient)

    def test_parameter_hooks_run_once_as_in_any_backward_pass(self):
        net, model, opt, x, y = make()
        _, _, gradient = oracle(net, x, y, opt.alpha)
        mask = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64).view(4, 1, 1, 1)
        seen = []
        net[0].weight.register_hook(lambda g: g * mask)
        net[7].bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        opt.backward(losses_of(model, x, y))
        gradient[0] = gradient[0] * mask
        assert_close(grads(model), gradient)
        assert len(seen) == 1

    def test_does_not_touch_gradients_of_inputs_or_of_other_networks(self):
        _, model, opt, x, y = make()
        head = nn.Linear(5, 5).double()
        x.requires_grad_()
        opt.backward(F.cross_entropy(head(model(x)), y, reduction="none"))
        assert x.grad is None
        assert head.weight.grad is None
        assert all(g is not None for g in grads(model))

    def test_float32_keeps_types(self):
        net = network(dtype=torch.float32)
        model = engm.GradNormModule(net)
        opt = engm.ENGM(model, sgd(model), 0.5)
        stats = opt.backward(losses_of(model, *batch(dtype=torch.float32)))
        assert stats.norms.dtype == stats.weights.dtype == torch.float32
        assert all(
            g.dtype == torch.float32 and g.shape == p.shape
            for g, p in zip(grads(model), net.parameters(), strict=False)
        )


class Branches(nn.Module):
    """Three layers, of which a step uses two."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)
        self.skip_b = False

    def forward(self, x):
        return self.head(torch.tanh(self.a(x) if self.skip_b else self.b(x)))


class TestParametersOutOfReach:
    def test_unused_parameters_keep_no_gradient_and_no_stale_norm(self):
        torch.manual_seed(0)
        net = Branches().double()
        model = engm.GradNormModule(net)
        opt = engm.ENGM(model, sgd(model), 0.3)
        x, y = torch.randn(6, 6, dtype=torch.float64), torch.arange(6) % 5
        for skip in (False, True, False):
            model.skip_b = skip
            used, unused = (net.a, net.b) if skip else (net.b, net.a)
            weights, norms, _ = oracle(net, x, y, 0.3)
            stats = opt.backward(losses_of(model, x, y))
            assert unused.weight.grad is None
            assert unused.bias.grad is None
            assert used.weight.grad is not None
            assert_close(stats.norms, norms)
            assert_close(stats.weights, weights)
            opt.step()
            opt.zero_grad()


class TestAlpha:
    def test_infinity_clips_nothing(self):
        net, model, opt, x, y = make(alpha=float("inf"))
        stats = opt.backward(losses_of(model, x, y))
        assert_same(stats.weights, torch.ones(8, dtype=torch.float64))
        _, _, gradient = oracle(net, x, y, float("inf"))
        assert_close(grads(model), gradient)

    def test_may_change_between_steps(self):
        net, model, opt, x, y = make()
        for alpha in (opt.alpha / 3, opt.alpha * 2):
            opt.alpha = alpha
            weights, _, _ = oracle(net, x, y, alpha)
            assert_close(opt.backward(losses_of(model, x, y)).weights, weights)

    @pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), "five", None, torch.tensor([1.0, 2.0])])
    def test_must_be_positive(self, alpha):
        model = engm.GradNormModule(network())
        with pytest.raises(ValueError, match="alpha"):
            engm.ENGM(model, sgd(model), alpha)

    def test_norm_zero_has_weight_one(self):
        _, model, opt, x, y = make()
        losses = losses_of(model, x, y) * torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 0], dtype=torch.float64)
        stats = opt.backward(losses)
        assert stats.norms[[0, 7]].tolist() == [0, 0]
        assert stats.weights[[0, 7]].tolist() == [1, 1]
        assert all(torch.isfinite(g).all() for g in grads(model))


class TestNotFinite:
    @pytest.mark.parametrize("norm", ["group", "batch"])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_unchecked_gives_nan_weights_that_show(self, norm, bad):
        _, model, opt, x, y = make(norm)
        losses = losses_of(model, x, y) * torch.tensor([1.0, 1, bad, 1, 1, 1, 1, 1], dtype=torch.float64)
        stats = opt.backward(losses, check=False)
        assert torch.isnan(stats.weights[2])
        assert norm == "batch" or torch.isfinite(stats.weights[[0, 1, 3, 4, 5, 6, 7]]).all()
        assert all(torch.isnan(g).any() for g in grads(model))

    def test_an_overflowing_norm_of_a_finite_loss_is_nan_too(self):
        net = network(dtype=torch.float32)
        model = engm.GradNormModule(net)
        opt = engm.ENGM(model, sgd(model), 1.0)
        x, y = batch(4, dtype=torch.float32)
        losses = losses_of(model, x, y) * torch.tensor([1.0, 1e30, 1, 1])
        stats = opt.backward(losses)
        assert torch.isnan(stats.weights).tolist() == [False, True, False, False]
        assert all(torch.isnan(g).any() for g in grads(model))


class TestTrainingModeBatchNorm:
    def test_update_is_the_gradient_of_the_reweighted_loss(self):
        net, model, opt, x, y = make("batch")
        twin = copy.deepcopy(net)
        stats = opt.backward(losses_of(model, x, y))
        assert 0 < (stats.weights < 1).sum() < 8
        (losses_of(twin, x, y) * stats.weights).mean().backward()
        assert_close(grads(model), grads(twin))
        assert_same(dict(model.named_buffers()), dict(twin.named_buffers()))

    def test_own_pass_and_reweighted_pass(self):
        _, model, opt, x, y = make("batch")
        opt.backward(losses_of(model, x, y))  # strict check and calibration
        losses = losses_of(model, x, y)
        with backward_passes() as passes:
            opt.backward(losses)
        assert passes == ["grad", "backward"]

    def test_calibrated_weights_are_near_the_exact_ones(self):
        net, model, opt, x, y = make("batch", n=64)
        weights, norms, gradient = oracle(net, x, y, opt.alpha)
        stats = opt.backward(losses_of(model, x, y))
        assert float(((stats.weights - weights).abs() / weights).mean()) < 0.05
        found, wanted = (torch.cat([g.flatten() for g in gs]) for gs in (grads(model), gradient))
        assert float(F.cosine_similarity(found, wanted, dim=0)) > 0.998
        raw = engm.GradNormModule(net, batch_norm="frozen")
        error = float((engm.per_example_grad_norms(raw, losses_of(raw, x, y)) / norms - 1).abs().mean())
        assert float((stats.norms / norms - 1).abs().mean()) < error / 2, "calibration must earn its keep"

    def test_calibrated_on_the_whole_batch_the_mean_squared_ratio_is_exact(self):
        net, model, opt, x, y = make("batch", calibrate_examples=8)
        twin = copy.deepcopy(net)
        exact = per_example_gradients(losses_of(twin, x, y), trained(twin))
        stats = opt.backward(losses_of(model, x, y))
        assert_close(float((stats.norms / exact.norms).square().mean()), 1.0)

    def test_exact_mode_is_the_paper_to_the_letter(self):
        net, model, opt, x, y = make("batch", batch_norm="exact")
        weights, norms, gradient = oracle(net, x, y, opt.alpha)
        stats = opt.backward(losses_of(model, x, y))
        assert_close(stats.norms, norms)
        assert_close(stats.weights, weights)
        assert_close(grads(model), gradient)

    def test_frozen_mode_is_the_graph_with_constant_statistics(self):
        net, model, opt, x, y = make("batch", batch_norm="frozen")
        norms = frozen_gradients(net, x, y).norms
        stats = opt.backward(losses_of(model, x, y))
        assert_close(stats.norms, norms)
        assert_close(stats.weights, clip(norms, opt.alpha))


def frozen_gradients(net, x, y):
    """Per-example gradients of a copy in evaluation mode whose running statistics are those of this batch."""
    twin = copy.deepcopy(net)
    for layer in twin:
        if isinstance(layer, nn.BatchNorm2d):
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            layer.running_mean.copy_(mean.detach())
            layer.running_var.copy_(var.detach())
            layer.eval()
        x = layer(x)
    twin.eval()
    return per_example_gradients(F.cross_entropy(x, y, reduction="none"), trained(twin))
