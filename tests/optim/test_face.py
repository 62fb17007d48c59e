"""What every outer optimizer has in common: it is a torch optimizer in all that torch asks of one."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from methods import METHODS
from oracle import per_example_gradients, trained
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR
from training import (
    assert_close,
    assert_same,
    batch,
    clip,
    grads,
    losses_of,
    network,
    sgd,
)

import engm

ALL = METHODS | {"aengm": lambda model, inner: engm.AENGM(model, inner, 5.0, tau=2)}
every_method = pytest.mark.parametrize("method", ALL)


def make(method="engm", norm="group", inner=sgd):
    model = engm.GradNormModule(network(norm))
    return model, ALL[method](model, inner(model))


def train(model, opt, steps=2, first=0):
    for step in range(first, first + steps):
        x, y = batch(8, seed=step)
        opt.backward(losses_of(model, x, y), x)
        opt.step()
        opt.zero_grad()


INNER = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "timm's lamb": lambda p: timm.optim.Lamb(p, lr=0.01, weight_decay=0.01),
}


class TestInner:
    @pytest.mark.parametrize("inner", INNER)
    def test_any_torch_optimizer_steps_with_the_clipped_gradient(self, inner):
        net = network()
        plain = copy.deepcopy(net)
        model = engm.GradNormModule(net)
        opt = engm.ENGM(model, INNER[inner](model.parameters()), 5.0)
        reference = INNER[inner](plain.parameters())
        for step in range(3):
            x, y = batch(8, seed=step)
            exact = per_example_gradients(losses_of(plain, x, y), trained(plain))
            for parameter, grad in zip(plain.parameters(), exact.mean(clip(exact.norms, 5.0)), strict=True):
                parameter.grad = grad
            reference.step()
            opt.backward(losses_of(model, x, y))
            opt.step()
            opt.zero_grad()
            assert_close(list(net.parameters()), list(plain.parameters()), rtol=1e-8)

    def test_weight_decay_is_no_part_of_the_norm(self):
        x, y = batch()
        found = []
        for decay in (0.0, 10.0):
            model = engm.GradNormModule(network())
            opt = engm.ENGM(model, sgd(model, weight_decay=decay), 0.5)
            found.append(opt.backward(losses_of(model, x, y)).norms)
        assert_same(found[0], found[1])

    def test_groups_keep_their_own_rates(self):
        net = network()
        model = engm.GradNormModule(net)
        groups = [{"params": list(net[0].parameters()), "lr": 0.0}, {"params": list(net[3].parameters())}]
        opt = engm.ENGM(model, torch.optim.SGD(groups, lr=0.1), 5.0)
        opt.add_param_group({"params": list(net[7].parameters()), "lr": 0.3})
        assert [group["lr"] for group in opt.param_groups] == [0.0, 0.1, 0.3]
        before = [p.detach().clone() for p in net.parameters()]
        opt.backward(losses_of(model, *batch()))
        wanted = [g.clone() for g in grads(model)]
        opt.step()
        rates = [0.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.0, 0.0, 0.3, 0.3]
        expected = [b - rate * g for b, rate, g in zip(before, rates, wanted, strict=True)]
        assert_close([p.detach() for p in net.parameters()], expected)

    def test_must_be_one(self):
        model = engm.GradNormModule(network())
        with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got generator"):
            engm.ENGM(model, model.parameters(), 1.0)
        with pytest.raises(TypeError, match=r"engm.GradNormModule"):
            engm.ENGM(network(), sgd(model), 1.0)
        with pytest.raises(TypeError, match="got generator: parameters go to the torch optimizer"):
            engm.ENGM(model.parameters(), sgd(model), 1.0)


@every_method
class TestTorchOptimizer:
    def test_is_one(self, method):
        _model, opt = make(method)
        assert isinstance(opt, torch.optim.Optimizer)
        assert opt.param_groups is opt.optimizer.param_groups
        assert opt.state is opt.optimizer.state
        assert opt.defaults is opt.optimizer.defaults

    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_zero_grad(self, method, set_to_none):
        model, opt = make(method)
        x, y = batch()
        opt.backward(losses_of(model, x, y), x)
        opt.zero_grad(set_to_none=set_to_none)
        assert all(g is None if set_to_none else not g.any() for g in grads(model))
        opt.backward(losses_of(model, x, y), x)
        assert all(g.any() for g in grads(model))

    def test_hooks_of_steps_and_of_state(self, method):
        model, opt = make(method)
        seen = []
        opt.register_step_pre_hook(lambda *_: seen.append("pre"))
        handle = opt.register_step_post_hook(lambda *_: seen.append("post"))
        opt.register_state_dict_pre_hook(lambda *_: seen.append("save"))
        opt.register_load_state_dict_post_hook(lambda *_: seen.append("load"))
        train(model, opt, 1)
        handle.remove()
        train(model, opt, 1)
        opt.load_state_dict(opt.state_dict())
        assert seen == ["pre", "post", "pre", "save", "load"]

    def test_repr_names_the_method_its_options_and_the_inner_optimizer(self, method):
        _, opt = make(method)
        assert repr(opt).startswith(type(opt).__name__ + "(")
        assert "momentum: 0.9" in repr(opt)
        assert {"msgd": "MSGD(", "sngm": "SNGM(", "gnc": "max_norm="}.get(method, "alpha=") in repr(opt)
        assert method != "aengm" or "tau=2, beta_gamma=0.7" in repr(opt)

    @pytest.mark.parametrize("scheduled", [False, True])
    def test_copies_go_on_alike_and_apart(self, method, scheduled):
        model, opt = make(method, "batch")
        if scheduled:
            StepLR(opt, 1)  # it wraps opt.step
        train(model, opt)
        buffer = io.BytesIO()
        torch.save((model, opt), buffer)
        buffer.seek(0)
        copies = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))]
        copies.append(torch.load(buffer, weights_only=False))
        train(model, opt, first=2)
        for twin, twin_opt in copies:
            assert twin_opt.model is twin
            assert all(p is q for p, q in zip(twin_opt.param_groups[0]["params"], twin.parameters(), strict=True))
            train(twin, twin_opt, first=2)
            assert_same(twin.state_dict(), model.state_dict())

    def test_gradients_may_be_clipped_before_the_step(self, method):
        model, opt = make(method)
        x, y = batch()
        opt.backward(losses_of(model, x, y), x)
        before = torch.cat([g.flatten() for g in grads(model)])
        total = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        assert_close(total, before.norm())
        after = torch.cat([g.flatten() for g in grads(model)])
        assert_close(after, before * 1e-3 / (before.norm() + 1e-6))


class TestSchedulers:
    @pytest.mark.parametrize("on_inner", [False, True])
    def test_step_lr_without_a_warning(self, on_inner, recwarn):
        model, opt = make()
        scheduler = StepLR(opt.optimizer if on_inner else opt, step_size=2, gamma=0.1)
        rates = []
        for step in range(5):
            rates.append(opt.param_groups[0]["lr"])
            train(model, opt, 1, first=step)
            scheduler.step()
        assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])
        assert not [str(w.message) for w in recwarn if "lr_scheduler" in str(w.message)]

    def test_one_cycle_moves_rate_and_momentum(self):
        model, opt = make()
        scheduler = OneCycleLR(opt, max_lr=1.0, total_steps=10)
        reference = sgd(network())
        expected = OneCycleLR(reference, max_lr=1.0, total_steps=10)
        for step in range(9):
            train(model, opt, 1, first=step)
            scheduler.step()
            reference.step()
            expected.step()
            for key in ("lr", "momentum"):
                assert opt.param_groups[0][key] == reference.param_groups[0][key]

    def test_one_after_another_and_on_plateau(self):
        model, opt = make()
        one, two = StepLR(opt, 1, gamma=0.5), StepLR(opt, 1, gamma=0.1)
        scheduler = SequentialLR(opt, [one, two], milestones=[2])
        rates = []
        for step in range(4):
            rates.append(opt.param_groups[0]["lr"])
            train(model, opt, 1, first=step)
            scheduler.step()
        assert rates == pytest.approx([0.1, 0.05, 0.1, 0.01])
        plateau = ReduceLROnPlateau(opt, patience=0)
        plateau.step(1.0)
        plateau.step(2.0)
        assert opt.param_groups[0]["lr"] == pytest.approx(1e-4)


class TestReweight:
    @every_method
    @pytest.mark.parametrize("norm", ["group", "batch"])
    def test_then_backward_is_backward(self, method, norm):
        model, opt = make(method, norm)
        x, y = batch()
        opt.backward(losses_of(model, x, y), x)
        expected, stats = [g.clone() for g in grads(model)], opt.stats
        model, opt = make(method, norm)
        losses = losses_of(model, x, y)
        weighted = opt.reweight(losses, x)
        assert_close(weighted.detach(), losses.detach() * stats.weights)
        assert_close(opt.stats.weights, stats.weights)
        weighted.mean().backward()
        assert_close(grads(model), expected)

    @every_method
    def test_the_graph_stays(self, method):
        model, opt = make(method)
        x, y = batch()
        losses = losses_of(model, x, y)
        opt.reweight(losses, x)
        first = opt.stats.weights
        opt.reweight(losses, x)
        assert method == "aengm" or torch.equal(opt.stats.weights, first)
        losses.mean().backward()
        assert all(g is not None for g in grads(model))

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("method", ["engm", "nengm", "msgd"])
    def test_grad_scaler(self, method, fused):
        x, y = batch(dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        nets = [network(dtype=torch.float32) for _ in range(2)]
        models = [engm.GradNormModule(net) for net in nets]
        plain, scaled = (ALL[method](model, sgd(model, fused=fused)) for model in models)
        for _ in range(3):
            plain.zero_grad()
            plain.backward(losses_of(models[0], x, y), x)
            plain.step()
            scaled.zero_grad()
            scaler.scale(scaled.reweight(losses_of(models[1], x, y), x).mean()).backward()
            scaler.step(scaled)
            scaler.update()
        assert_close(list(nets[1].parameters()), list(nets[0].parameters()), rtol=1e-5, atol=1e-6)
        assert scaler.get_scale() == 1024.0

    @pytest.mark.parametrize("fused", [False, True])
    def test_grad_scaler_skips_a_step_that_is_not_finite(self, fused):
        x, y = batch(dtype=torch.float32)
        model = engm.GradNormModule(network(dtype=torch.float32))
        opt = engm.ENGM(model, sgd(model, fused=fused), 5.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before = copy.deepcopy(model.state_dict())
        losses = losses_of(model, x, y) * torch.tensor([torch.inf] + [1.0] * 7)
        scaler.scale(opt.reweight(losses, check=False).mean()).backward()
        scaler.step(opt)
        scaler.update()
        assert_same(model.state_dict(), before)
        assert scaler.get_scale() == 512.0

    def test_backward_with_a_scaler_s_own_scale(self):
        x, y = batch(dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(1))
        nets = [network(dtype=torch.float32) for _ in range(2)]
        models = [engm.GradNormModule(net) for net in nets]
        plain, scaled = (engm.ENGM(model, sgd(model), 5.0) for model in models)
        plain.backward(losses_of(models[0], x, y))
        plain.step()
        scaled.backward(losses_of(models[1], x, y), loss_scale=scaler.get_scale())
        scaler.step(scaled)
        assert_close(list(nets[1].parameters()), list(nets[0].parameters()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["engm", "aengm"])
def test_losses_in_float16_under_a_scale_that_is_too_large_for_them(method):
    """The first scale of a GradScaler is 65536, and the largest number 65504: the step is skipped, the scale halved."""
    x, y = batch(dtype=torch.float32)
    x.requires_grad_()
    model = engm.GradNormModule(network(dtype=torch.float32))
    opt = ALL[method](model, sgd(model, lr=0.01))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = copy.deepcopy(model.state_dict())
    for step in range(4):
        scale = scaler.get_scale()
        with torch.autocast("cpu", torch.float16):
            losses = (model(x) - F.one_hot(y, 5).half()).square().mean(1)
        assert losses.dtype == torch.float16
        opt.zero_grad()
        weighted = opt.reweight(losses, x, loss_scale=scaler.scale(torch.ones(())).item())
        scaler.scale(weighted.mean()).backward()
        scaler.step(opt)
        scaler.update()
        if step == 0:
            assert_same(model.state_dict(), before)
        else:
            assert scaler.get_scale() == scale < 2.0**16
    assert bool(opt.stats.norms.isfinite().all())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("method", ["engm", "nengm", "aengm", "fengm", "gnc"])
def test_a_state_with_a_number_out_of_range_is_refused_whole(method):
    model, opt = make(method)
    train(model, opt, 1)
    state = copy.deepcopy(opt.state_dict())
    numbers = state["engm"]["hyperparameters"]
    numbers["max_norm" if method == "gnc" else "alpha"] = -3.0
    state["param_groups"][0]["lr"] = 17.0
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="must be"):
        opt.load_state_dict(state)
    assert_same(opt.state_dict(), before)


@every_method
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_same_run_twice_is_the_same_bits(method, norm):
    found = []
    for _ in range(2):
        model, opt = make(method, norm)
        train(model, opt, 4)
        found.append((dict(model.state_dict()), opt.state_dict()))
    assert_same(found[0], found[1])


def test_a_step_says_itself_in_a_line():
    model, opt = make("engm")
    opt.alpha = 0.5
    stats = opt.backward(losses_of(model, *batch(8)))
    weights, norms = stats.weights, stats.norms
    assert str(stats) == (
        f"8 examples: mean loss {stats.losses.mean():.4g}, mean weight {weights.mean():.4g}, "
        f"{(weights < 1).sum() / 8:.0%} clipped, median norm {norms.median():.4g} (own)"
    )
    model, opt = make("msgd")
    assert "norm" not in str(opt.backward(losses_of(model, *batch(8))))
