"""A loop that keeps its own backward pass goes round the weights: one warning says so, and only there."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from methods import METHODS
from training import batch, losses_of, network, sgd

import engm

MESSAGE = "no example in them was weighted: call opt.backward"


def made(method):
    model = engm.GradNormModule(network("group"))
    return model, METHODS[method](model, sgd(model))


def plainly(model, opt):
    losses_of(model, *batch(8)).mean().backward()
    opt.step()
    opt.zero_grad()


@pytest.mark.parametrize("method", ["engm", "nengm", "fengm"])
@pytest.mark.parametrize("weighted_before", [False, True])
def test_a_backward_pass_of_the_loops_own_is_warned_of_once(method, weighted_before):
    model, opt = made(method)
    if weighted_before:
        x, y = batch(8)
        opt.backward(losses_of(model, x, y), x)
        opt.step()
        opt.zero_grad()
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        plainly(model, opt)
    with warnings.catch_warnings(action="error"):
        plainly(model, opt)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_steps_that_are_as_they_should_be_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, opt = made("engm")
        opt.step()  # nothing to do
        opt.backward(losses_of(model, *batch(8)))
        losses_of(model, *batch(8, seed=1)).mean().mul(1e-3).backward()  # a regulariser beside
        opt.step()
        opt.zero_grad()
        opt.step()
        opt.reweight(losses_of(model, *batch(8))).mean().backward()
        opt = pickle.loads(pickle.dumps(copy.deepcopy(opt)))
        opt.step()
        plain = made("msgd")
        plainly(*plain)
        for group in opt.param_groups:  # as torch.distributed.checkpoint prepares a state
            group["lr"] = torch.tensor(0.0)
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        opt.step()
