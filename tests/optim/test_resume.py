"""A run that is saved and resumed goes on bit for bit."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from methods import METHODS as ALL
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from training import assert_same, batch, losses_of, network, sgd, snapshot

import engm

METHODS = ALL | {"aengm": lambda model, inner: engm.AENGM(model, inner, 5.0, tau=3)}
INNER = {"sgd": sgd, "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01)}


def make(method, norm, inner="sgd", seed=0):
    model = engm.GradNormModule(network(norm, seed=seed), calibrate_every=3, calibrate_examples=4)
    return model, METHODS[method](model, INNER[inner](model))


def train(model, opt, first, last, borrow=False):
    for step in range(first, last):
        x, y = batch(8, seed=step)
        measured = None
        if borrow and step % 2:
            model.eval()
            leaf = x.clone().requires_grad_()
            measured = engm.measure(model, losses_of(model, leaf, y), leaf)
            model.train()
        opt.backward(losses_of(model, x, y), x, measurement=measured)
        opt.step()
        opt.zero_grad()


def through_a_file(*states):
    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("inner", INNER)
def test_a_resumed_run_equals_an_uninterrupted_one(method, norm, inner):
    model, opt = make(method, norm, inner)
    train(model, opt, 0, 4, borrow=True)
    saved = through_a_file(model.state_dict(), opt.state_dict())
    train(model, opt, 4, 9, borrow=True)

    resumed, resumed_opt = make(method, norm, inner, seed=1)
    resumed.load_state_dict(saved[0])
    resumed_opt.load_state_dict(saved[1])
    train(resumed, resumed_opt, 4, 9, borrow=True)
    assert_same(resumed.state_dict(), model.state_dict())
    assert_same(resumed_opt.state_dict(), opt.state_dict())
    assert_same(vars(resumed_opt.stats), vars(opt.stats))


def test_forgetting_our_part_of_the_state_would_show():
    """The test above must be able to fail: without factors and coefficients the run is another one."""
    model, opt = make("aengm", "batch")
    train(model, opt, 0, 4)
    saved = through_a_file(model.state_dict(), opt.state_dict())
    train(model, opt, 4, 6)
    resumed, resumed_opt = make("aengm", "batch", seed=1)
    resumed.load_state_dict(saved[0])
    resumed_opt.optimizer.load_state_dict({key: saved[1][key] for key in ("state", "param_groups")})
    train(resumed, resumed_opt, 4, 6)
    assert not all(torch.equal(a, b) for a, b in zip(resumed.parameters(), model.parameters(), strict=True))


def test_what_was_saved_does_not_change_with_the_run():
    model, opt = make("aengm", "batch")
    train(model, opt, 0, 2)
    saved = opt.state_dict()["engm"]
    before = copy.deepcopy(saved)
    train(model, opt, 2, 8)
    assert_same(saved, before)


def test_the_state_says_what_it_is():
    _, opt = make("aengm", "batch")
    assert list(opt.state_dict()) == ["state", "param_groups", "engm"]
    assert opt.state_dict()["engm"]["method"] == "AENGM"
    assert {"gamma", "steps", "fits", "calibration"} <= set(opt.state_dict()["engm"])


class TestRefused:
    """Nothing is changed by a state that does not fit."""

    def check(self, opt, state, error, message):
        before = snapshot(opt)
        with pytest.raises(error, match=message):
            opt.load_state_dict(state)
        assert_same(snapshot(opt), before)

    def test_of_another_method(self):
        model, opt = make("engm", "batch")
        train(model, opt, 0, 2)
        other_model, other = make("nengm", "batch")
        train(other_model, other, 0, 2)
        self.check(opt, other.state_dict(), ValueError, "this state_dict is of NENGM, not of ENGM")

    def test_of_a_plain_optimizer(self):
        _model, opt = make("engm", "batch")
        self.check(
            opt, sgd(network()).state_dict(), ValueError, "a plain torch optimizer.*opt.optimizer.load_state_dict"
        )

    @pytest.mark.parametrize("method", ["engm", "aengm"])
    def test_of_other_groups(self, method):
        model, opt = make(method, "batch")
        train(model, opt, 0, 4)
        other_model, other = make(method, "none")
        train(other_model, other, 0, 2)
        self.check(opt, other.state_dict(), ValueError, "parameter group")

    def test_incomplete(self):
        model, opt = make("aengm", "batch")
        train(model, opt, 0, 2)
        other_model, other = make("aengm", "batch")
        train(other_model, other, 0, 4)
        state = other.state_dict()
        del state["engm"]["gamma"]
        self.check(opt, state, KeyError, "gamma")


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), np.int64(2)], ids=lambda n: type(n).__name__)
def test_numbers_of_numpy_can_be_loaded(number, tmp_path):
    """Which a command line or a file of settings may give; torch.load refuses them."""

    def made(alpha):
        net = network()
        model = engm.GradNormModule(net)
        several = [[name] for name, _ in net.named_parameters()]
        yield engm.ENGM(model, sgd(model), alpha)
        yield engm.ENGM(model, sgd(model), [alpha] * len(several), groups=several)
        yield engm.AENGM(model, sgd(model), alpha)
        yield engm.GNC(model, sgd(model), alpha)

    for opt, other in zip(made(number), made(1.0), strict=True):
        torch.save(opt.state_dict(), tmp_path / "opt.pt")
        other.load_state_dict(torch.load(tmp_path / "opt.pt"))
        assert_same(other.state_dict()["engm"]["hyperparameters"], opt.state_dict()["engm"]["hyperparameters"])


def test_beside_torchs_distributed_checkpoints():
    """Which know of the inner optimizer alone, as docs/optimizers/loops.md says."""
    model, opt = make("aengm", "group")
    train(model, opt, 0, 2)
    inner = copy.deepcopy(get_optimizer_state_dict(model, opt.optimizer))
    own = copy.deepcopy(opt.state_dict()["engm"])
    other_model, other = make("aengm", "group")
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other.optimizer, inner)
    other.load_state_dict({**other.state_dict(), "engm": own})
    assert_same(other.state_dict(), opt.state_dict())
