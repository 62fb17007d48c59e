"""ENGM beyond the paper: a threshold that follows the norms, other weight functions, clipping by groups."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import per_example_gradients, trained
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
from engm.optim.threshold import RunningQuantile


def make(norm="group", alpha=1.0, **options):
    model = engm.GradNormModule(network(norm))
    return model, engm.ENGM(model, sgd(model), alpha, **options), *batch()


class TestAuto:
    @pytest.mark.parametrize("fraction", [0.25, 0.5, 0.9])
    def test_the_first_batch_is_clipped_to_its_own_quantile(self, fraction):
        model, opt, x, y = make(alpha="auto", clip_fraction=fraction)
        exact = per_example_gradients(losses_of(model, x, y), trained(model))
        stats = opt.backward(losses_of(model, x, y))
        quantile = torch.quantile(exact.norms, 1 - fraction)
        assert_close(stats.weights, clip(exact.norms, quantile))
        assert_close(grads(model), exact.mean(stats.weights))
        assert stats.clipped_fraction == (exact.norms > quantile).double().mean()

    def test_follows_the_norms(self):
        """The losses grow a hundredfold; so does the threshold, and the clipped fraction stays."""
        model, opt, x, y = make(alpha="auto", clip_fraction=0.5)
        first = None
        for factor in [1.0] * 3 + [100.0] * 60:
            opt.zero_grad()
            stats = opt.backward(losses_of(model, x, y) * factor)
            first = opt.quantile.value.clone() if first is None else first
        assert_close(opt.quantile.value / first, torch.tensor(100.0, dtype=torch.float64), rtol=0.01)
        assert stats.clipped_fraction == 0.5

    @pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
    def test_examples_without_a_gradient_do_not_count(self, fraction):
        """Masked losses: most of the batch may have none, and the others are clipped as they were without them."""
        model, opt, x, y = make(alpha="auto", clip_fraction=fraction)
        mask = torch.zeros(len(y), dtype=torch.float64)
        mask[:3] = 1
        exact = per_example_gradients(losses_of(model, x, y) * mask, trained(model))
        stats = opt.backward(losses_of(model, x, y) * mask)
        quantile = torch.quantile(exact.norms[:3], 1 - fraction)
        assert_close(stats.weights[:3], clip(exact.norms[:3], quantile))
        assert opt.quantile.value > 0
        before = opt.quantile.value.clone()
        assert_same(opt.backward(losses_of(model, x, y) * 0).weights, torch.ones_like(mask))
        assert_same(opt.quantile.value, before)

    def test_a_first_batch_without_gradients(self):
        model, opt, x, y = make(alpha="auto")
        assert_same(opt.backward(losses_of(model, x, y) * 0).weights, torch.ones(len(y), dtype=torch.float64))
        norms = opt.backward(losses_of(model, x, y)).norms
        assert_close(opt.quantile.value, norms.quantile(0.5))

    def test_can_be_set_and_left(self):
        model, opt, x, y = make(alpha="auto")
        opt.backward(losses_of(model, x, y))
        opt.alpha = 0.01
        stats = opt.backward(losses_of(model, x, y))
        assert_close(stats.weights, clip(stats.norms, 0.01))
        assert opt.quantile is None
        other = make()[1]
        other.load_state_dict(opt.state_dict())
        assert other.alpha == 0.01
        opt.alpha = "auto"
        stats = opt.backward(losses_of(model, x, y))
        assert_close(opt.quantile.value, stats.norms.quantile(0.5))
        for bad in ("nonsense", "5"):
            opt.alpha = bad
            with pytest.raises(ValueError, match="a positive number or 'auto'"):
                opt.backward(losses_of(model, x, y))

    def test_a_broken_batch_does_not_move_it(self):
        model, opt, x, y = make(alpha="auto")
        opt.backward(losses_of(model, x, y))
        before = opt.quantile.value.clone()
        weights = opt.backward(losses_of(model, x, y) * float("nan"), check=False).weights
        assert weights.isnan().all()
        assert_same(opt.quantile.value, before)

    def test_a_resumed_run_goes_on(self):
        model, opt, x, y = make(alpha="auto", clip_fraction=0.3)
        opt.backward(losses_of(model, x, y))
        saved = opt.state_dict()
        other_model, other, _, _ = make(alpha="auto", clip_fraction=0.3)
        other.load_state_dict(saved)
        for o, m in ((opt, model), (other, other_model)):
            o.zero_grad()
            o.backward(losses_of(m, *batch(seed=1)))
        assert_same(grads(other_model), grads(model))

    def test_a_state_of_the_other_kind_is_refused(self):
        _, auto, *_ = make(alpha="auto")
        _, fixed, *_ = make(alpha=2.0)
        for opt, state in ((auto, fixed.state_dict()), (fixed, auto.state_dict())):
            before = snapshot(opt)
            with pytest.raises(ValueError, match="make it alike first"):
                opt.load_state_dict(state)
            assert_same(snapshot(opt), before)

    @given(
        norms=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=40),
        fraction=st.floats(0.05, 0.95),
        smoothing=st.floats(0, 0.99),
    )
    def test_a_constant_distribution_is_a_fixed_point(self, norms, fraction, smoothing):
        quantile, norms = RunningQuantile(fraction, smoothing), torch.tensor(norms, dtype=torch.float64)
        for _ in range(3):
            quantile.value = quantile.following(norms)
        assert_close(quantile.value, torch.quantile(norms, 1 - fraction))

    @pytest.mark.parametrize("fraction", [0, 1, -1, "x", float("nan")])
    def test_fractions_lie_between_0_and_1(self, fraction):
        with pytest.raises(ValueError, match="clip_fraction must lie between 0 and 1"):
            make(alpha="auto", clip_fraction=fraction)


class TestWeigh:
    @pytest.mark.parametrize("norm", ["group", "batch"])
    def test_is_the_users_function_of_norms_and_alpha(self, norm):
        model, opt, x, y = make(norm, 0.7, weigh=lambda norms, alpha: alpha / (alpha + norms))
        losses = losses_of(model, x, y)
        exact = per_example_gradients(losses, trained(model))
        stats = opt.backward(losses)
        assert_close(stats.weights, 0.7 / (0.7 + stats.norms))
        assert_close(grads(model), exact.mean(stats.weights))

    def test_a_norm_that_is_not_finite_has_no_weight_of_0(self):
        model, opt, x, y = make(weigh=lambda norms, alpha: alpha / (alpha + norms))
        bad = torch.ones(len(y), dtype=torch.float64)
        bad[1] = torch.inf
        weights = opt.backward(losses_of(model, x, y) * bad, check=False).weights
        assert weights.isnan().tolist() == [k == 1 for k in range(len(y))]

    def test_what_is_no_function_is_refused_at_once(self):
        with pytest.raises(TypeError, match="weigh must be a function"):
            make(weigh=3)

    def test_sees_the_running_threshold(self):
        seen = []
        model, opt, x, y = make(alpha="auto", weigh=lambda norms, alpha: seen.append(alpha) or torch.ones_like(norms))
        opt.backward(losses_of(model, x, y))
        assert_same(seen[0], opt.quantile.value)

    @pytest.mark.parametrize("bad", [lambda norms, alpha: 1.0, lambda norms, alpha: norms[:3]])
    def test_a_wrong_shape_is_one_clear_error(self, bad):
        model, opt, x, y = make(weigh=bad)
        with pytest.raises(ValueError, match="weigh must return one weight for each of the 8 norms"):
            opt.backward(losses_of(model, x, y))
        assert grads(model) == [None] * len(grads(model))


def by_hand(model, losses, rows_of_groups, alphas):
    """The weighted gradient and the weights [groups, n], group by group."""
    exact = per_example_gradients(losses, trained(model))
    names, total, weights = list(exact.gradients), [None] * len(exact.gradients), []
    for group, alpha in zip(rows_of_groups, alphas, strict=True):
        part = exact.part(names[k] for k in group)
        weights.append(clip(part.norms, alpha))
        for k, gradient in zip(group, part.mean(weights[-1]), strict=True):
            total[k] = gradient
    return total, torch.stack(weights)


class TestGroups:
    @pytest.mark.parametrize("norm", ["group", "none"])
    def test_every_tensor_by_itself(self, norm):
        model, opt, x, y = make(norm, 0.9, groups="parameter")
        count = len(grads(model))
        want, weights = by_hand(model, losses_of(model, x, y), [[k] for k in range(count)], [0.9 / sqrt(count)] * count)
        stats = opt.backward(losses_of(model, x, y))
        assert stats.weights.shape == stats.norms.shape == (count, 8)
        assert_close(stats.weights, weights)
        assert_close(grads(model), want)

    def test_the_whole_gradient_keeps_its_bound(self):
        model, opt, x, y = make("group", 0.5, groups="parameter")
        stats = opt.backward(losses_of(model, x, y))
        assert ((stats.weights * stats.norms).square().sum(0).sqrt() <= 0.5 * (1 + 1e-9)).all()

    def test_named_groups_with_a_bound_each(self):
        model, opt, x, y = make("group", [0.3, 2.0], groups=self.halves())
        want, weights = by_hand(model, losses_of(model, x, y), opt.groups, [0.3, 2.0])
        stats = opt.backward(losses_of(model, x, y))
        assert_close(stats.weights, weights)
        assert_close(grads(model), want)

    @staticmethod
    def halves():
        names = [name for name, _ in network("group").named_parameters()]
        return [names[::2], names[1::2]]

    def test_batch_norm_takes_a_backward_pass_a_group(self):
        model = engm.GradNormModule(network("batch"), batch_norm="exact")
        opt = engm.ENGM(model, sgd(model), 0.6, groups=self.halves())
        x, y = batch()
        want, weights = by_hand(model, losses_of(model, x, y), opt.groups, [0.6 / sqrt(2)] * 2)
        with backward_passes() as passes:
            stats = opt.backward(losses_of(model, x, y))
        assert passes.count("backward") == 2
        assert_close(stats.weights, weights, rtol=1e-6)
        assert_close(grads(model), want, rtol=1e-6)

    def test_reweight_refuses(self):
        model, opt, x, y = make(groups="parameter")
        with pytest.raises(ValueError, match="clipping by groups needs"):
            opt.reweight(losses_of(model, x, y))

    @pytest.mark.parametrize(
        ("groups", "alpha", "message"),
        [
            ("layer", 1.0, "groups must be 'parameter'"),
            ([["0.weight"]], 1.0, "name every trained parameter once"),
            ([["0.weight", "0.weight"]], 1.0, "name every trained parameter once"),
            ("parameter", "auto", "without groups"),
            ("parameter", [1.0, 2.0], "one for each of the"),
            (None, [1.0, 2.0], "only with groups"),
        ],
    )
    def test_bad_options(self, groups, alpha, message):
        with pytest.raises(ValueError, match=message):
            make(alpha=alpha, groups=groups)


class TestNoiseScale:
    def test_is_the_estimate_from_every_gradient(self):
        model, opt, x, y = make(alpha=0.8)
        exact = per_example_gradients(losses_of(model, x, y), trained(model))
        stats = opt.backward(losses_of(model, x, y))
        each = exact.flat * stats.weights[:, None]
        trace = each.var(0, unbiased=True).sum()
        signal = each.mean(0).square().sum() - trace / 8
        assert_close(opt.gradient_noise_scale(), trace / signal)

    def test_needs_a_batch(self):
        model, opt, *_ = make()
        with pytest.raises(RuntimeError, match="between opt"):
            opt.gradient_noise_scale()
        plain = engm.MSGD(model, sgd(model))
        plain.backward(losses_of(model, *batch()))
        with pytest.raises(RuntimeError, match="reads norms"):
            plain.gradient_noise_scale()
