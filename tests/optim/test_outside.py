"""Parameters that the wrapper does not hold: they would quietly go untrained, so they are named and refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from methods import METHODS, every
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from training import assert_close, assert_same, batch, grads, losses_of, network, sgd, snapshot

import engm


def plain_sgd(*parts, **options):
    """One optimizer over the parameters of all parts."""
    return torch.optim.SGD([p for part in parts for p in part.parameters()], **{"lr": 0.1, **options})


def head():
    torch.manual_seed(3)
    return nn.Linear(5, 4).double()


def losses_behind(head, model, x, y):
    return F.cross_entropy(head(model(x)), y % 4, reduction="none")


class TestConstruction:
    @every()
    def test_a_head_in_the_optimizer_is_refused_and_named(self, method):
        model, outer = engm.GradNormModule(network()), head()
        with pytest.raises(ValueError, match="2 trained parameters that the wrapped model does not") as caught:
            METHODS[method](model, plain_sgd(model, outer))
        said = str(caught.value)
        assert "param_groups[0]['params'][10] of shape (4, 5)" in said
        assert "param_groups[0]['params'][11] of shape (4,)" in said
        assert "GradNormModule(nn.Sequential(net, head))" in said
        assert "opt.reweight(losses).mean().backward()" in said

    def test_names_are_told_where_the_optimizer_knows_them(self):
        model = engm.GradNormModule(network())
        both = nn.ModuleDict({"model": model, "head": head()})
        with pytest.raises(ValueError, match=r"'head.weight' \(param_groups\[0\]\['params'\]\[10\]\)"):
            engm.ENGM(model, torch.optim.SGD(both.named_parameters(), lr=0.1), 1.0)

    def test_of_many_the_first_are_named(self):
        model = engm.GradNormModule(network())
        with pytest.raises(ValueError, match=r"10 trained parameters .* and more"):
            engm.ENGM(model, plain_sgd(network()), 1.0)

    def test_one_without_a_shape_yet(self):
        model = engm.GradNormModule(network())
        with pytest.raises(ValueError, match="of shape not known yet"):
            engm.ENGM(model, plain_sgd(model, nn.LazyLinear(3)), 1.0)

    def test_what_it_says_to_do_is_right(self):
        x, y = batch()
        model = engm.GradNormModule(nn.Sequential(network(), head()))
        opt = engm.ENGM(model, sgd(model), 1.0)
        opt.backward(F.cross_entropy(model(x), y % 4, reduction="none"))
        assert all(gradient is not None for gradient in grads(model))

        model, outer = engm.GradNormModule(network()), head()
        opt, own = engm.ENGM(model, sgd(model), 1.0), plain_sgd(outer)
        weighted = opt.reweight(losses_behind(outer, model, x, y))
        weighted.mean().backward()
        assert all(gradient is not None for gradient in (*grads(model), *grads(outer)))
        own.step()

    def test_added_later(self):
        model, outer = engm.GradNormModule(network()), head()
        opt = engm.ENGM(model, sgd(model), 1.0)
        before = snapshot(opt)
        with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\]\[0\] of shape \(4, 5\)"):
            opt.add_param_group({"params": outer.parameters(), "lr": 0.3})
        assert_same(snapshot(opt), before)
        outer.requires_grad_(False)
        opt.add_param_group({"params": outer.parameters(), "lr": 0.3})
        assert len(opt.param_groups) == 2


class TestLegitimate:
    def step(self, model, opt):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the losses reach")
            opt.backward(losses_of(model, *batch()))
            opt.step()
            opt.zero_grad()

    def test_a_frozen_one_from_elsewhere(self):
        model = engm.GradNormModule(network())
        self.step(model, engm.ENGM(model, plain_sgd(model, head().requires_grad_(False)), 1.0))

    def test_a_subset(self):
        net = network()
        model = engm.GradNormModule(net)
        opt = engm.ENGM(model, plain_sgd(net[7]), 1.0)
        before = net[0].weight.detach().clone()
        self.step(model, opt)
        assert_same(net[0].weight.detach(), before)

    def test_frozen_in_the_optimizer_and_unfrozen_on_the_way(self):
        net = network()
        net[0].requires_grad_(False)
        model = engm.GradNormModule(net)
        opt = engm.ENGM(model, plain_sgd(net), 1e9)
        self.step(model, opt)
        net[0].requires_grad_(True)
        losses = losses_of(model, *batch())
        expected = torch.autograd.grad(losses.mean(), net[0].weight, retain_graph=True)[0]
        opt.backward(losses)
        assert_close(net[0].weight.grad, expected)

    def test_an_optimizer_that_was_made_before_a_conversion(self):
        net = network(dtype=torch.float32)
        inner = plain_sgd(net)
        net.double()
        model = engm.GradNormModule(net)
        self.step(model, engm.ENGM(model, inner, 1.0))
        opt = engm.ENGM(model, inner, 1.0)
        net.float().double()
        self.step(model, opt)

    @pytest.mark.parametrize("how", [parametrizations.orthogonal, parametrizations.weight_norm])
    def test_parametrizations_registered_since(self, how):
        """``weight_norm`` leaves the old weight in the optimizer, as torch does; nothing reaches it any more."""
        net = network()
        model = engm.GradNormModule(net)
        opt = engm.ENGM(model, plain_sgd(net), 1.0)
        how(net[7])
        assert parametrize.is_parametrized(net[7])
        self.step(model, opt)

    def test_lazy_modules(self):
        net = nn.Sequential(nn.Flatten(), nn.LazyLinear(5)).double()
        model = engm.GradNormModule(net)
        opt = engm.ENGM(model, plain_sgd(net), 1.0)
        with torch.no_grad():
            model(batch()[0])
        self.step(model, opt)

    def test_a_compiled_wrapper_and_a_copy(self):
        model = engm.GradNormModule(network())
        opt = copy.deepcopy(engm.ENGM(torch.compile(model), sgd(model), 1.0))
        self.step(opt.model, opt)


class TestSteps:
    @every()
    @pytest.mark.parametrize("call", ["backward", "reweight"])
    def test_unfrozen_on_the_way_and_reached(self, method, call):
        model, outer = engm.GradNormModule(network()), head().requires_grad_(False)
        opt = METHODS[method](model, plain_sgd(model, outer))
        outer.requires_grad_(True)
        x, y = batch()
        losses = losses_behind(outer, model, x.requires_grad_(), y)
        before = snapshot(opt)
        with pytest.raises(RuntimeError, match=r"reach 2 trained parameters of the opt.*\[10\] of shape \(4, 5\)"):
            getattr(opt, call)(losses, x)
        assert_same(snapshot(opt), before)
        outer.requires_grad_(False)
        getattr(opt, call)(losses_behind(outer, model, x, y), x)

    @every()
    def test_a_head_with_an_optimizer_of_its_own_gets_a_warning_once(self, method):
        model, outer = engm.GradNormModule(network()), head()
        opt = METHODS[method](model, sgd(model))
        x, y = batch()
        x.requires_grad_()
        with pytest.warns(UserWarning, match=r"2 trained parameter\(s\) outside of the wrapped model") as caught:
            opt.backward(losses_behind(outer, model, x, y), x)
        assert caught[0].filename == __file__
        assert grads(outer) == [None, None]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the losses reach")
            opt.backward(losses_behind(outer, model, x, y), x)

    def test_none_for_reweight_a_frozen_head_or_leaves_that_are_no_parameters(self):
        model, outer = engm.GradNormModule(network()), head()
        opt = engm.ENGM(model, sgd(model), 1.0)
        x, y = batch()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the losses reach")
            opt.reweight(losses_behind(outer, model, x, y)).mean().backward()
            opt.backward(losses_behind(outer.requires_grad_(False), model, x.requires_grad_(), y))

    def test_a_learnable_temperature(self):
        """It has an optimizer of its own, and the reweighted losses give it its gradient."""
        model, temperature = engm.GradNormModule(network()), nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        opt = engm.ENGM(model, sgd(model), 1.0)
        x, y = batch()
        losses = F.cross_entropy(model(x) / temperature, y, reduction="none")
        each = torch.stack([torch.autograd.grad(loss, temperature, retain_graph=True)[0] for loss in losses])
        opt.reweight(losses).mean().backward()
        assert_close(temperature.grad, (opt.stats.weights * each).mean())
