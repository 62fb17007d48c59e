"""Inner optimizers that evaluate the loss themselves: every evaluation is weighted, and none goes round the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from methods import METHODS, every
from oracle import per_example_gradients, trained
from training import assert_close, assert_same, batch, clip, grads, losses_of, network, snapshot

import engm


def lbfgs(model, **options):
    return torch.optim.LBFGS(model.parameters(), **{"lr": 0.5, "max_iter": 4, **options})


def closure_of(opt, model, x, y, found=None):
    def closure():
        opt.zero_grad()
        losses = losses_of(model, x, y)
        opt.backward(losses, x)
        if found is not None:
            found.append(opt.stats)
        return losses.mean()

    return closure


class TestLBFGS:
    @pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
    def test_clipping_nothing_is_plain(self, line_search):
        net = network()
        plain = copy.deepcopy(net)
        model = engm.GradNormModule(net)
        opt = engm.ENGM(model, lbfgs(model, line_search_fn=line_search), 1e9)
        reference = lbfgs(plain, line_search_fn=line_search)
        x, y = batch()

        def closure():
            reference.zero_grad()
            loss = losses_of(plain, x, y).mean()
            loss.backward()
            return loss

        for _ in range(2):
            assert_close(opt.step(closure_of(opt, model, x, y)), reference.step(closure), rtol=1e-7)
        assert_close(list(net.parameters()), list(plain.parameters()), rtol=1e-6, atol=1e-8)

    def test_every_evaluation_is_clipped(self):
        net = network()
        model = engm.GradNormModule(net)
        opt = engm.ENGM(model, lbfgs(model), 0.5)
        x, y = batch()
        found = []

        def closure():
            loss = closure_of(opt, model, x, y, found)()
            exact = per_example_gradients(losses_of(net, x, y), trained(net))
            assert_close(grads(model), list(exact.mean(clip(exact.norms, 0.5))), rtol=1e-7)
            return loss

        opt.step(closure)
        assert len(found) == 4
        assert all(stats.clipped_fraction > 0 for stats in found)

    @every()
    def test_without_a_closure(self, method):
        model = engm.GradNormModule(network())
        opt = METHODS[method](model, lbfgs(model))
        x, y = batch()
        opt.backward(losses_of(model, x.requires_grad_(), y), x)
        before = snapshot(opt)
        with pytest.raises(TypeError, match=r"LBFGS .* needs a closure: opt.step\(closure\), where closure calls"):
            opt.step()
        assert_same(snapshot(opt), before)

    @every()
    def test_all_of_them_step_and_resume(self, method):
        model = engm.GradNormModule(network())
        opt = METHODS[method](model, lbfgs(model))
        x, y = batch()
        x.requires_grad_()
        opt.step(closure_of(opt, model, x, y))
        twin = engm.GradNormModule(copy.deepcopy(model.unwrap()))
        other = METHODS[method](twin, lbfgs(twin))
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.step(closure_of(opt, model, x, y))
        other.step(closure_of(other, twin, x, y))
        assert_same(list(twin.parameters()), list(model.parameters()))


@every()
class TestOthers:
    def sgd(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def test_a_closure_is_backward_and_step(self, method):
        found = []
        for with_closure in (False, True):
            model = engm.GradNormModule(network())
            opt = METHODS[method](model, self.sgd(model))
            for step in range(2):
                x, y = batch(seed=step)
                closure = closure_of(opt, model, x.requires_grad_(), y)
                if with_closure:
                    opt.step(closure)
                else:
                    closure()
                    opt.step()
            found.append(list(model.parameters()))
        assert_same(*found)

    def test_one_that_goes_round_the_weights_is_refused(self, method):
        model = engm.GradNormModule(network())
        opt = METHODS[method](model, self.sgd(model))
        x, y = batch()
        before = [p.detach().clone() for p in model.parameters()]

        def closure():
            loss = losses_of(model, x, y).mean()
            loss.backward()
            return loss

        with pytest.raises(RuntimeError, match=r"closure called neither opt.backward\(losses\) nor"):
            opt.step(closure)
        assert_same([p.detach() for p in model.parameters()], before)
