"""What a loop may do without a word from torch: it does what it does in torch, or it is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from methods import METHODS, every
from torch import nn
from training import assert_close, assert_same, batch, grads, losses_of, network, sgd, snapshot

import engm
from engm.optim import Weighting
from engm.optim.batch import LossBatch


def make(method="engm", norm="group"):
    model = engm.GradNormModule(network(norm))
    x, y = batch()
    return model, METHODS[method](model, sgd(model)), x.requires_grad_(), y


def wanted(method="engm", norm="group"):
    """The gradient of one step, nothing special about it."""
    model, opt, x, y = make(method, norm)
    opt.backward(losses_of(model, x, y), x)
    return [g.clone() for g in grads(model)]


class TestGradients:
    @every()
    def test_zeros_that_were_left_are_filled_in_place(self, method):
        model, opt, x, y = make(method)
        opt.backward(losses_of(model, x, y), x)
        opt.zero_grad(set_to_none=False)
        assert all(bool((g == 0).all()) for g in grads(model))
        places = [g.data_ptr() for g in grads(model)]
        opt.backward(losses_of(model, x, y), x)
        assert [g.data_ptr() for g in grads(model)] == places
        assert_close(grads(model), wanted(method))

    @every()
    def test_no_two_share_memory(self, method):
        found = wanted(method)
        assert len({g.untyped_storage().data_ptr() for g in found}) == len(found)

    @every()
    def test_with_a_graph_of_their_own(self, method):
        """They are left by ``backward(create_graph=True)`` of a penalty."""
        model, opt, x, y = make(method)
        for p in model.parameters():
            p.grad = torch.zeros_like(p).requires_grad_()
        opt.backward(losses_of(model, x, y), x)
        assert_close([g.detach() for g in grads(model)], wanted(method))

    @every()
    @pytest.mark.parametrize("norm", ["group", "batch"])
    def test_without_recording_around_backward(self, method, norm):
        """torch's own ``backward`` does not mind ``no_grad`` either."""
        model, opt, x, y = make(method, norm)
        losses = losses_of(model, x, y)
        with torch.no_grad():
            opt.backward(losses, x)
        assert_close(grads(model), wanted(method, norm))

    @every()
    @pytest.mark.parametrize("norm", ["group", "batch"])
    def test_without_recording_around_reweight(self, method, norm):
        model, opt, x, y = make(method, norm)
        losses = losses_of(model, x, y)
        with torch.no_grad():
            found = opt.reweight(losses, x)
        assert not found.requires_grad
        assert_same(found, losses.detach() * opt.stats.weights)

    @every()
    @pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
    def test_hooks_run_once_for_every_parameter(self, method, kind):
        model, opt, x, y = make(method)
        seen = []
        for p in model.parameters():
            getattr(p, kind)(lambda _: seen.append(1))
        opt.backward(losses_of(model, x, y), x)
        assert len(seen) == len(list(model.parameters()))

    def test_a_hook_of_a_module_that_changes_the_gradient_changes_that_of_every_example(self):
        model, _, x, y = make()
        opt = engm.ENGM(model, sgd(model), 1e9)
        model.unwrap()[3].register_full_backward_hook(lambda _, given, __: (given[0] * 2,))
        losses = losses_of(model, x, y)
        expected = torch.autograd.grad(losses.mean(), list(model.parameters()), retain_graph=True)
        opt.backward(losses)
        assert_close(grads(model), list(expected))


class TestLosses:
    @every()
    @pytest.mark.parametrize("call", ["backward", "reweight"])
    def test_of_a_detached_part_are_refused(self, method, call):
        model, opt, x, y = make(method)
        temperature = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        losses = F.cross_entropy(model(x).detach() * temperature, y, reduction="none")
        before = snapshot(opt)
        with pytest.raises(RuntimeError, match=r"reach no trained parameter|not computed by a captured forward pass"):
            getattr(opt, call)(losses, x)
        assert_same(snapshot(opt), before)

    @every()
    def test_other_forward_passes_in_between_do_not_matter(self, method):
        model, opt, x, y = make(method)
        losses = losses_of(model, x, y)
        losses_of(model, x.detach() + 1, y).sum()
        with torch.no_grad():
            model(x)
        opt.backward(losses, x)
        assert_close(grads(model), wanted(method))

    @every()
    def test_backward_after_reweight(self, method):
        model, opt, x, y = make(method)
        losses = losses_of(model, x, y)
        opt.reweight(losses, x)
        opt.backward(losses, x)
        assert_close(grads(model), wanted(method))

    @every()
    def test_backward_twice(self, method):
        model, opt, x, y = make(method)
        losses = losses_of(model, x, y)
        opt.backward(losses, x)
        before = snapshot(opt)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            opt.backward(losses, x)
        assert_same(snapshot(opt), before)

    @every()
    def test_a_step_between_forward_and_backward(self, method):
        model, opt, x, y = make(method)
        first, second = losses_of(model, x, y), losses_of(model, x, y)
        opt.backward(first, x)
        opt.step()
        opt.zero_grad()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            opt.backward(second, x)
        assert grads(model) == [None] * len(grads(model))


class TestOptionsSetSince:
    @pytest.mark.parametrize(
        ("method", "option", "value"),
        [
            ("gnc", "max_norm", -1.0),
            ("gnc", "max_norm", 0),
            ("fengm", "alpha", float("inf")),
            ("aengm", "tau", 0),
            ("aengm", "beta_gamma", 1.0),
        ],
    )
    def test_are_checked(self, method, option, value):
        model, opt, x, y = make(method)
        setattr(opt, option, value)
        before = snapshot(opt)
        with pytest.raises(ValueError, match=option):
            opt.backward(losses_of(model, x, y), x)
        assert_same(snapshot(opt), before)

    def test_a_negative_bound_does_not_turn_the_gradient_round(self):
        model, opt, x, y = make("gnc")
        opt.backward(losses_of(model, x, y))
        opt.max_norm = -1.0
        before = snapshot(opt)
        with pytest.raises(ValueError, match="max_norm"):
            opt.step()
        assert_same(snapshot(opt), before)


class TestForms:
    """Gradients have the memory and the type that autograd gives them."""

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
    @pytest.mark.parametrize("make", ["channels last", "transposed", "expanded"])
    def test_strides_are_the_parameters(self, make, inner, fused):
        torch.manual_seed(0)
        if make == "channels last":
            net = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(8, 1))
            net, x = net.to(memory_format=torch.channels_last), torch.randn(4, 2, 4, 4)
        else:
            net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(4, 3)
            weight = net[0].weight.detach()
            net[0].weight = nn.Parameter(weight.t().contiguous().t() if make == "transposed" else weight[:, ::1])
        plain = copy.deepcopy(net)
        model = engm.GradNormModule(net)
        opt, reference = (inner(each.parameters(), 0.1, fused=fused) for each in (model, plain))
        opt = engm.ENGM(model, opt, 1e9)
        for _ in range(3):
            opt.backward(model(x).squeeze(1).square())
            plain(x).squeeze(1).square().mean().backward()
            for own, other in zip(net.parameters(), plain.parameters(), strict=True):
                assert own.grad.stride() == other.grad.stride()
            opt.step()
            reference.step()
            torch.testing.assert_close(list(net.parameters()), list(plain.parameters()))
            opt.zero_grad()
            reference.zero_grad()

    @pytest.mark.parametrize("call", ["backward", "reweight"])
    @pytest.mark.parametrize("wanted", [torch.float32, None, torch.bfloat16])
    def test_the_type_of_gradients(self, wanted, call):
        """A parameter of 16 bits may add its gradients up in 32."""
        net = nn.Linear(6, 1).bfloat16()
        unused = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
        net.register_parameter("unused", unused)
        for parameter in net.parameters():
            parameter.grad_dtype = wanted
        model = engm.GradNormModule(net)
        opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.1), 1e9)
        for _ in range(2000):
            losses = model(torch.ones(2, 6, dtype=torch.bfloat16)).squeeze(1) + 0 * unused.sum()
            if call == "backward":
                opt.backward(losses, divisor=500.0)
            else:
                (opt.reweight(losses).sum() / 500).backward()
        if wanted == torch.float32:
            assert net.bias.grad.dtype == torch.float32
            torch.testing.assert_close(net.bias.grad, torch.tensor([8.0]), rtol=1e-2, atol=0)
        elif wanted is not None:
            assert net.bias.grad.dtype == torch.bfloat16

    def test_nothing_is_added_if_something_cannot_be(self):
        model, opt, x, y = make()
        opt.backward(losses_of(model, x, y), x)
        *_, last = model.parameters()
        with torch.inference_mode():
            last.grad = torch.zeros_like(last)
        before = [g.clone() for g in grads(model)]
        with pytest.raises(RuntimeError, match="made in inference mode"):
            opt.backward(losses_of(model, x, y), x)
        assert_same([g.clone() for g in grads(model)], before)


@pytest.mark.parametrize("scale", [2.0**40, 2.0**64, 2.0**69])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_scales_whose_square_overflows(scale, dtype):
    """A gradient scaler doubles its scale as long as nothing overflows."""
    model = engm.GradNormModule(network("group", dtype=dtype))
    x, y = batch(dtype=dtype)
    losses = losses_of(model, x, y) * 1e-6
    wanted = engm.per_example_grad_norms(model, losses)
    assert_close(engm.per_example_grad_norms(model, losses, loss_scale=scale), wanted)


class TestFailures:
    """What fails after the weights were made leaves the optimizer's own state as it was."""

    @pytest.mark.parametrize("call", ["backward", "reweight"])
    @pytest.mark.parametrize("make", [lambda m, s: engm.ENGM(m, s, "auto"), lambda m, s: engm.AENGM(m, s, 1.0, tau=1)])
    def test_later_than_the_weights(self, make, call, monkeypatch):
        model = engm.GradNormModule(network("group"))
        opt = make(model, sgd(model))
        x, y = batch()
        x.requires_grad_()
        for _ in range(2):
            opt.backward(losses_of(model, x, y), x)
        before = opt.state_dict()["engm"], dict(vars(opt))
        before = copy.deepcopy(before[0]), before[1]

        def fails(*_):
            raise RuntimeError("no memory")

        monkeypatch.setattr(LossBatch, "accumulate" if call == "backward" else "release", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            getattr(opt, call)(losses_of(model, x, y) * 3, x)
        assert_same(opt.state_dict()["engm"], before[0])
        assert vars(opt) == before[1]

    @pytest.mark.parametrize("call", ["backward", "reweight"])
    def test_weights_of_a_wrong_shape(self, call):
        class Own(engm.ENGM):
            def weights(self, norms):
                found = super().weights(norms)
                return Weighting(found.weights.unsqueeze(1) if self.shaped else found.weights.tolist(), found.norms)

        model = engm.GradNormModule(network("group"))
        opt = Own(model, sgd(model), 1.0)
        x, y = batch()
        opt.shaped = True
        with pytest.raises(ValueError, match=rf"Own.weights must return weights \[{len(y)}\]"):
            getattr(opt, call)(losses_of(model, x, y))
        opt.shaped = False
        with pytest.raises(TypeError, match=r"Own.weights must return an engm.optim.Weighting of a tensor"):
            getattr(opt, call)(losses_of(model, x, y))


def test_one_in_the_other_is_refused():
    model = engm.GradNormModule(network("group"))
    with pytest.raises(TypeError, match=r"one of torch's, not engm's GNC.*clip_grad_norm_"):
        engm.ENGM(model, engm.GNC(model, sgd(model)), 1.0)
