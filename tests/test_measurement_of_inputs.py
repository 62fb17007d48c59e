"""Measurements without norms: the gradients of the inputs alone."""

import contextlib
import gc
import weakref

import pytest
import torch
import training

import engm
import engm.module


class TestInputsAlone:
    """``norms=False``: an ordinary backward pass to the inputs, which N-ENGM reads."""

    @pytest.mark.parametrize("norm", ["group", "batch"])
    @pytest.mark.parametrize("paused", [False, True])
    def test_is_autograds_gradient(self, norm, paused):
        model = engm.GradNormModule(training.network(norm))
        x, y = training.batch()
        x.requires_grad_()
        with model.paused() if paused else contextlib.nullcontext():
            losses = training.losses_of(model, x, y)
        (want,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
        measured = engm.measure(model, losses, x, norms=False, loss_scale=8.0)
        torch.testing.assert_close(measured.input_grads, want)
        torch.testing.assert_close(measured.input_norms, want.flatten(1).norm(dim=1))
        assert measured.stacked is None
        losses.sum().backward()  # the graph is still there

    def test_asking_for_norms_later_is_one_clear_error(self):
        model = engm.GradNormModule(training.network())
        x, y = training.batch()
        x.requires_grad_()
        measured = engm.measure(model, training.losses_of(model, x, y), x, norms=False)
        for look in (lambda: measured.norms, lambda: measured.squared_norms):
            with pytest.raises(ValueError, match="norms=False"):
                look()
        opt = engm.ENGM(model, training.sgd(model), 1.0)
        with pytest.raises(ValueError, match="taken with norms=False and this step reads norms"):
            opt.backward(training.losses_of(model, x, y), measurement=measured)

    def test_without_inputs_there_is_nothing_to_measure(self):
        model = engm.GradNormModule(training.network())
        x, y = training.batch()
        with pytest.raises(ValueError, match="pass inputs"):
            engm.measure(model, training.losses_of(model, x, y), norms=False)


class Product(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)

    def forward(self, u, v):
        return self.first(u) * self.second(v)


class TestOneTensorTwice:
    """A tensor that does not require grad and is given more than once has one gradient, that of all its uses."""

    @pytest.mark.parametrize("times", [1, 2])
    @pytest.mark.parametrize("norms", [True, False])
    def test_is_the_gradient_of_all_its_uses(self, times, norms):
        torch.manual_seed(0)
        model, x = engm.GradNormModule(Product().double()), torch.randn(5, 6).double()
        model.input_grads_wanted = True
        leaf = x.clone().requires_grad_()

        def losses(given):
            return sum((k + 1) * model(given, given).square().sum(1) for k in range(times))

        (want,) = torch.autograd.grad(losses(leaf).sum(), leaf)
        computed = losses(x)
        found = engm.measure(model, computed, inputs=x) if norms else None
        stats = engm.NENGM(model, training.sgd(model), 0.05).backward(computed, inputs=x)
        torch.testing.assert_close(stats.input_norms, want.norm(dim=1))
        if found is not None:
            torch.testing.assert_close(found.input_grads, want)

    def test_of_other_numbers_since_is_another(self):
        """A tensor that was given other memory is not what the graph of the pass before is of."""
        torch.manual_seed(0)
        model, x = engm.GradNormModule(Product().double()), torch.randn(5, 6).double()
        model.input_grads_wanted = True
        before = model(x, x)
        x.data = torch.randn(5, 6).double()
        now = model(x, x)
        torch.testing.assert_close(now, model.unwrap()(x, x))
        assert not torch.equal(before, now)

    def test_a_leaf_goes_with_its_graph(self):
        model, x = engm.GradNormModule(Product().double()), torch.randn(5, 6).double()
        model.input_grads_wanted = True
        leaves = []
        for _ in range(3):
            out = model(x, x)
            leaves.append(weakref.ref(next(iter(engm.module._LEAVES.values()))[1]()))
            del out
        gc.collect()
        assert [leaf() for leaf in leaves] == [None] * 3


@pytest.mark.parametrize("norms", [True, False])
def test_norms_of_inputs_in_float16_are_those_of_scaled_gradients(norms):
    """Divided by the scale they would lose their digits, or be 0."""
    net = training.network("group", dtype=torch.float32)
    model = engm.GradNormModule(net)
    x, y = training.batch(dtype=torch.float32)
    half = x.half().requires_grad_()
    losses = training.losses_of(model, half.float(), y) * torch.logspace(-3, -7, len(y))
    measured = engm.measure(model, losses, inputs=half, norms=norms, loss_scale=2.0**14)
    leaf = half.detach().float().requires_grad_()
    (want,) = torch.autograd.grad((training.losses_of(net, leaf, y) * torch.logspace(-3, -7, len(y))).sum(), leaf)
    torch.testing.assert_close(measured.input_norms.float(), want.flatten(1).norm(dim=1), rtol=5e-3, atol=0)


class Marked(torch.Tensor):
    """A tensor of the user's, as torchvision's images are."""


def test_a_subclass_reaches_the_network_as_it_is():
    class Looks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 3)

        def forward(self, x):
            assert type(x) is Marked
            return self.layer(x.as_subclass(torch.Tensor)) * x.factor

    model = engm.GradNormModule(Looks().double())
    model.input_grads_wanted = True
    x = torch.randn(5, 6).double().as_subclass(Marked)
    x.factor = 2.0
    found = engm.measure(model, model(x).square().sum(1), inputs=x)
    leaf = x.as_subclass(torch.Tensor).clone().requires_grad_()
    (want,) = torch.autograd.grad((model.unwrap().layer(leaf) * 2).square().sum(), leaf)
    torch.testing.assert_close(found.input_grads.as_subclass(torch.Tensor), want)
