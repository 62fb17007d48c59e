"""What the wrapper remembers of a forward pass, for how long, and that nothing else is left behind."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_measured, check, random_losses, relative, tensor, truth
from torch import nn
from torch.utils.checkpoint import checkpoint

import engm
from engm.capture import CALLS_KEY
from engm.graph import trace


class Net(nn.Module):
    """A little of everything that couples nothing: views, in-place operations, a residual."""

    def __init__(self, channels=4):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.instance = nn.InstanceNorm2d(channels, affine=True)
        self.tokens = nn.Linear(channels, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        out = self.instance(self.conv(x))
        out += x
        out = F.relu_(out).flatten(2).transpose(1, 2)
        return self.head(F.relu_(self.tokens(out)).mean(1))


X = tensor(4, 3, 6, 6)


def losses_of(model, x=X):
    return random_losses(model(x))


def net_and_model(**options):
    net = Net().double()
    return net, engm.GradNormModule(net, **options)


def traces_of(net):
    """Everything that lies on the modules of a network, its tensors aside."""
    return [
        (name, sorted(module.__dict__), {k: len(v) for k, v in module.__dict__.items() if "hook" in k and v is not None})
        for name, module in net.named_modules()
    ] + [(name, sorted(vars(p)), p._backward_hooks) for name, p in net.named_parameters()]


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


# -- nothing is left behind -----------------------------------------------------------------------------------


def test_nothing_is_left_on_the_network():
    net, model = net_and_model()
    before = traces_of(net)
    losses = losses_of(model)
    assert traces_of(net) == before
    engm.measure(model, losses)
    assert traces_of(net) == before
    engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), 1.0).backward(losses)
    assert traces_of(net) == before
    assert model.unwrap() is net


def test_exception_inside_forward_leaves_no_hooks():
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyError("on purpose")

    net = nn.Sequential(nn.Linear(4, 4), Fails())
    before = traces_of(net)
    model = engm.GradNormModule(net)
    with pytest.raises(KeyError, match="on purpose"):
        model(torch.randn(2, 4))
    assert traces_of(net) == before


def test_failed_measurement_leaves_the_graph_usable():
    net, model = net_and_model(strict=False)
    losses = losses_of(model)
    with pytest.raises(RuntimeError, match="losses"):
        engm.measure(model, losses[:3] + losses[1:])
    assert relative(engm.measure(model, losses).norms, truth(net, losses_of).norms) <= 1e-9


@pytest.mark.parametrize("backward", ["none", "plain", "measure", "both", "naive"])
def test_captured_calls_die_with_the_graph(backward):
    """By reference counts alone: no cycle keeps activations until the garbage collector comes."""
    _, model = net_and_model()
    gc.collect()
    gc.disable()
    try:
        losses = losses_of(model)
        calls = [weakref.ref(call) for call in trace(losses).calls]
        assert len(calls) == 6
        activations = [weakref.ref(ref()._activations) for ref in calls if ref()._activations is not X]
        if backward == "naive":
            engm.naive_grad_norms(model, losses)
        if backward in ("measure", "both"):
            engm.measure(model, losses)
        if backward in ("plain", "both"):
            losses.sum().backward()
        del losses
        assert [ref() for ref in calls] == [None] * 6
        assert [ref() for ref in activations] == [None] * 5
    finally:
        gc.enable()


def test_activations_are_let_go_by_the_backward_pass_itself():
    """The graph's own buffers are freed by ``backward``; what was captured must not outlive them."""
    _, model = net_and_model()
    losses = losses_of(model)
    activations = [weakref.ref(call._activations) for call in trace(losses).calls if call._activations is not X]
    losses.sum().backward()
    assert [ref() for ref in activations] == [None] * 5
    assert losses.grad_fn is not None


def test_one_pass_backward_lets_activations_go():
    _, model = net_and_model()
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), 1.0)
    losses = losses_of(model)
    activations = [weakref.ref(call._activations) for call in trace(losses).calls if call._activations is not X]
    opt.backward(losses)
    assert [ref() for ref in activations] == [None] * 5


def test_attack_steps_before_the_training_forward():
    """Ten graphs come and go; none of their calls is alive when the training forward is measured."""
    net, model = net_and_model()
    x, dead = X.clone(), []
    for _ in range(10):
        x.requires_grad_()
        losses = losses_of(model, x)
        dead += [weakref.ref(call) for call in trace(losses).calls]
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        x = (x + 0.01 * gradient.sign()).detach()
    del losses
    assert [ref() for ref in dead] == [None] * 60
    assert_measured(engm.measure(model, losses_of(model, x)), truth(net, lambda m: losses_of(m, x)))


def test_layer_skipped_on_the_second_step():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.skip = nn.Linear(4, 4), nn.Linear(4, 4), False

        def forward(self, x):
            return self.a(x) if self.skip else self.b(torch.relu_(self.a(x)))

    net, x = Skips().double(), tensor(3, 4)
    model = engm.GradNormModule(net)
    for skip in (False, True, False):
        net.skip = skip
        measured = engm.measure(model, losses_of(model, x))
        assert_measured(measured, truth(net, lambda m: losses_of(m, x)))
        assert bool((measured.squared_norms["b.weight"] == 0).all()) == skip


def test_forward_never_backpropagated():
    net, model = net_and_model()
    kept = losses_of(model, X + 1)
    assert_measured(engm.measure(model, losses_of(model)), truth(net, losses_of))
    assert_measured(engm.measure(model, kept), truth(net, lambda m: losses_of(m, X + 1)))


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
    with pytest.raises((RuntimeError, ValueError), match="captured forward pass|no graph"):
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
        except Exception as error:  # noqa: BLE001
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
    record = engm.capture.Capture(model)._hook("conv", engm.rules.find_rule(nn.Linear(2, 2)), thread=-1)
    assert record(nn.Linear(2, 2), (), torch.zeros(1)) is None


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


# -- errors ----------------------------------------------------------------------------------------------------


def test_input_modified_after_the_layer_read_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.a(x) + 0
            out = self.b(h)
            h.mul_(2.0)
            return out

    model = engm.GradNormModule(Net().double(), strict=False)
    losses = losses_of(model, tensor(3, 4))
    with pytest.raises(RuntimeError, match="modified in place|modified by an inplace"):
        engm.measure(model, losses)


def test_measure_after_backward_is_one_clear_error():
    _, model = net_and_model()
    losses = losses_of(model)
    losses.sum().backward()
    with pytest.raises(RuntimeError, match="already backpropagated|second time"):
        engm.measure(model, losses)


def test_measure_after_backward_where_the_graph_has_no_buffers():
    """Torch itself does not complain about a layer that it need not run; the engine must."""
    model = engm.GradNormModule(nn.Sequential(nn.Linear(4, 3)).double())
    losses = model(tensor(3, 4)).sum(1)
    losses.sum().backward()
    with pytest.raises(RuntimeError, match="already backpropagated"):
        engm.measure(model, losses)


@pytest.mark.parametrize("first", ["backward", "grad", "naive", "measure"])
def test_measure_after_a_pass_that_keeps_the_graph(first):
    net, model = net_and_model()
    x = X.clone().requires_grad_()
    losses = losses_of(model, x)
    if first == "backward":
        losses.sum().backward(retain_graph=True)
    elif first == "grad":
        torch.autograd.grad(losses.sum(), x, retain_graph=True)
    elif first == "naive":
        engm.naive_grad_norms(model, losses)
    else:
        engm.measure(model, losses, x)
    assert_measured(engm.measure(model, losses), truth(net, losses_of))


def test_measure_after_a_kept_pass_under_autocast():
    """The layers then read casts, which nobody but the engine keeps alive."""
    net = Net()
    model = engm.GradNormModule(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model, X.float())
    before = engm.measure(model, losses)
    losses.sum().backward(retain_graph=True)
    torch.testing.assert_close(engm.measure(model, losses).norms, before.norms)


# -- checkpointing ---------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant, part):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.b = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.ReLU())
        self.head = nn.Linear(4, 3)
        self.use_reentrant, self.part = use_reentrant, part

    def forward(self, x):
        for name in "ab":
            block = getattr(self, name)
            x = checkpoint(block, x, use_reentrant=self.use_reentrant) if name in self.part else block(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("part", ["a", "b", "ab"])
@pytest.mark.parametrize("training", [False, True])
def test_checkpointing(part, training):
    net = Checkpointed(False, part).double().train(training)
    check(net, losses_of, frozen=training)


def test_checkpointing_runs_no_layer_during_the_forward_pass():
    net = Checkpointed(False, "ab").double()
    losses_of(engm.GradNormModule(net))
    assert int(net.a[1].num_batches_tracked) == 1


@pytest.mark.parametrize("part", ["a", "b", "ab"])
def test_reentrant_checkpointing_is_refused(part):
    """It hides layers from the graph: their norms would silently be 0."""
    model = engm.GradNormModule(Checkpointed(True, part).double().eval())
    losses = losses_of(model, X.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        engm.measure(model, losses)


def test_calls_live_in_the_graph_and_nowhere_else():
    _, model = net_and_model()
    losses = losses_of(model)
    nodes = trace(losses).nodes
    assert all(CALLS_KEY in node.metadata for node in nodes)
