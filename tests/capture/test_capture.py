"""What the wrapper captures of a forward pass: which calls, in which threads, and in copies of the model."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from engine_checks import assert_measured, check
from little_network import Net, X, losses_of, net_and_model
from oracle import random_losses, relative, tensor, truth
from torch import nn

import engm
from engm.capture.calls import Capture
from engm.capture.hooks import Call, CallRecorder, _refuse
from engm.graph.trace import trace
from engm.rules import find_rule

pytestmark = pytest.mark.torch_insides


def test_the_network_of_these_tests():
    check(Net().double(), losses_of)


@pytest.mark.parametrize("in_place_after", ["conv", "norm", "instance", "batch", "tokens"])
def test_in_place_operations_after(in_place_after):
    layers = {
        "conv": nn.Conv2d(3, 3, 3),
        "norm": nn.GroupNorm(3, 3),
        "instance": nn.InstanceNorm2d(3, affine=True),
        "batch": nn.BatchNorm2d(3).eval(),
        "tokens": nn.Linear(6, 6),
    }

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.layer = nn.Conv2d(3, 3, 1), layers[in_place_after]

        def forward(self, x):
            out = self.layer(self.before(x))
            out += 1
            out[:, :, 0].mul_(2.0)
            F.relu_(out)
            return out

    check(Block().double(), losses_of)


# -- what is captured ------------------------------------------------------------------------------------------


def calls_behind(losses):
    return [call.name for call in trace(losses).calls]


def test_calls_nearest_to_the_losses_come_first():
    _, model = net_and_model()
    assert calls_behind(losses_of(model)) == ["head", "tokens", "instance", "conv", "norm", "stem"]


@pytest.mark.parametrize("how", ["net", "paused", "no_grad", "inference"])
def test_not_captured(how):
    net, model = net_and_model()
    if how == "net":
        losses = losses_of(net)
    elif how == "paused":
        with model.paused() as same:
            assert same is model
            losses = losses_of(model)
    else:
        with torch.no_grad() if how == "no_grad" else torch.inference_mode():
            losses = losses_of(model)
    with pytest.raises((RuntimeError, ValueError), match=r"captured forward pass|no graph"):
        engm.measure(model, losses)
    assert len(calls_behind(losses_of(model))) == 6, "capturing goes on afterwards"


def test_paused_ends_with_an_exception():
    _, model = net_and_model()
    with pytest.raises(KeyError), model.paused():
        raise KeyError
    assert len(calls_behind(losses_of(model))) == 6


def test_layers_under_no_grad_inside_the_network():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                h = self.a(x)
            return self.b(h)

    check(Half().double(), lambda m: losses_of(m, tensor(3, 4)))


def test_frozen_parameters():
    net = Net().double()
    net.stem.requires_grad_(False)
    net.conv.requires_grad_(False)
    net.norm.weight.requires_grad_(False)
    check(net, losses_of)


def test_parameters_frozen_between_forward_and_measurement():
    net, model = net_and_model()
    losses = losses_of(model)
    net.conv.requires_grad_(False)
    measured = engm.measure(model, losses)
    assert "conv.weight" not in measured.names
    assert_measured(measured, truth(net, losses_of))


@pytest.mark.parametrize("kind", ["dict", "tuple", "keywords"])
def test_structured_outputs_and_arguments(kind):
    class Structured(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x=None, *, scale=1.0):
            out = self.net(x) * scale
            return {"logits": out, "aux": [out * 2]} if kind == "dict" else (out, out * 2)

    def losses(m):
        if kind == "dict":
            out = m(X)
            return random_losses(out["logits"] + out["aux"][0])
        first, second = m(X) if kind == "tuple" else m(x=X, scale=2.0)
        return random_losses(first + second)

    check(Structured().double(), losses)


@pytest.mark.parametrize("prepend", [False, True])
def test_hooks_of_the_user_that_change_outputs(prepend):
    """The gradient wanted is that of the layer's own output, before anybody's hook."""
    net = Net().double()
    for module in (net.conv, net.tokens, net.norm):
        module.register_forward_hook(lambda m, args, out: torch.tanh(out) * 2, prepend=prepend)
        module.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,), prepend=prepend)
    calls = []
    net.head.register_full_backward_hook(lambda m, gi, go: calls.append(m))
    check(net, losses_of)
    assert calls


def test_user_tensor_hooks_are_respected():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.a(x)
            h.register_hook(lambda g: -0.5 * g)
            return self.b(torch.tanh(h))

    net, x = Reversed().double(), tensor(3, 4)
    model = engm.GradNormModule(net)
    expected = truth(net, lambda m: losses_of(m, x))

    measured = engm.measure(model, losses_of(model, x))
    assert_measured(measured, expected)


def test_threads_capture_their_own_calls_only():
    net, model = net_and_model()
    xs = [tensor(4, 3, 6, 6, seed=seed) for seed in range(4)]
    results, errors = {}, []
    barrier = threading.Barrier(4)

    def work(k):
        try:
            barrier.wait()
            for _ in range(15):
                losses = losses_of(model, xs[k])
                assert len(calls_behind(losses)) == 6
                results[k] = engm.measure(model, losses)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for k in range(4):
        assert_measured(results[k], truth(net, lambda m, x=xs[k]: losses_of(m, x)))


def test_hook_that_another_thread_took_off_meanwhile():
    """Torch then calls a hook registered with kwargs without them; in a thread that is not its own it must not mind."""
    _, model = net_and_model()
    layer, found = nn.Linear(2, 2), []
    record = CallRecorder(Capture(model), "conv", find_rule(layer), Call, _refuse, False)
    thread = threading.Thread(target=lambda: found.append(record(layer, (), torch.zeros(1))))
    thread.start()
    thread.join()
    assert found == [None]


# -- copies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("with_graph", [False, True])
def test_copies_of_the_wrapped_model(way, with_graph):
    net, model = net_and_model()
    losses = losses_of(model) if with_graph else None
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert other is not model
    assert other.unwrap() is not net
    with torch.no_grad():
        other.conv.weight.mul_(2.0)
    assert relative(other.unwrap().conv.weight, 2 * net.conv.weight) == 0
    assert_measured(engm.measure(other, losses_of(other)), truth(other.unwrap(), losses_of))
    assert_measured(engm.measure(model, losses_of(model)), truth(net, losses_of))
    with pytest.raises(RuntimeError, match="another GradNormModule"):
        engm.measure(other, losses_of(model))
    if losses is not None:
        assert_measured(engm.measure(model, losses), truth(net, losses_of))


def test_layer_replaced_after_wrapping():
    net, model = net_and_model()
    engm.measure(model, losses_of(model))
    net.head = nn.Linear(6, 2).double()
    assert_measured(engm.measure(model, losses_of(model)), truth(net, losses_of))
