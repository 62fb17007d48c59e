"""Measurements without norms: the gradients of the inputs alone."""

import contextlib

import pytest
import torch
import training

import engm


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
