"""torch.compile: of the network, of its parts, of what surrounds it; whatever is compiled, no norm may be wrong."""

import copy
import gc
import itertools
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import TOLERANCE, assert_measured, assert_step, random_losses, relative, tensor, truth
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointError, checkpoint

import engm
from engm.capture.compiled import CompiledCall, segment_of
from engm.graph.trace import trace

BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(inplace=True))
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), part, nn.Linear(8, 3)).double()


class Block(nn.Module):
    """One layer of a vision transformer on five positions."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.patch = nn.Conv1d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x):
        x = self.norm(self.patch(x)).transpose(1, 2)
        q, k, v = self.qkv(self.before(x)).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x.mean(1)


class Twice(nn.Module):
    """A layer called three times, twice on the same tensor, and one tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.tied, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.tied.weight = self.a.weight

    def forward(self, x):
        return self.out(torch.tanh(self.a(x)) + self.a(x) + self.a(torch.sin(x)) + self.tied(x.cos()))


def normed(**options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Sequential(nn.BatchNorm1d(8, **options), nn.ReLU()), nn.Linear(8, 3)
    ).double()


def whole(net):
    net.compile(backend=BACKEND, fullgraph=True)
    return net


def inside(net):
    return torch.compile(net, backend=BACKEND, fullgraph=True)


def part(net):
    net[2].compile(backend=BACKEND, fullgraph=True)
    return net


def replaced_part(net):
    net[2] = torch.compile(net[2], backend=BACKEND)
    return net


def part_forward(net):
    net[2].forward = torch.compile(net[2].forward, backend=BACKEND)
    return net


def layer(net):
    net[0].compile(backend=BACKEND)
    return net


def activation(net):
    net[1].compile(backend=BACKEND)
    return net


@pytest.mark.parametrize(
    "way",
    [
        inside,
        part,
        layer,
        activation,
        *(pytest.param(w, marks=pytest.mark.slow) for w in (replaced_part, part_forward)),
    ],
)
def test_networks_and_parts(way):
    x = tensor(5, 6)
    expected = truth(mlp(), lambda net: random_losses(net(x)))
    model = engm.GradNormModule(way(mlp()), strict=way is not part)
    names = [name for name, _ in model.trainable_parameters()]
    expected.gradients = dict(zip(names, expected.gradients.values(), strict=True))
    assert_measured(engm.measure(model, random_losses(model(x))), expected)


@pytest.mark.parametrize(("make", "shape"), [(Block, (3, 3, 9)), (Twice, (4, 6))])
def test_one_graph(make, shape):
    """The forward pass is one graph, traced once, with every captured layer inside."""
    x = tensor(*shape)
    net = make().double()
    expected = truth(net, lambda net: random_losses(net(x)))
    counter = CompileCounterWithBackend(BACKEND)
    model = engm.GradNormModule(net)
    model.compile(backend=counter, fullgraph=True)
    for _ in range(3):
        losses = random_losses(model(x))
        assert_measured(engm.measure(model, losses), expected)
        assert_step(model, losses, expected)
    assert counter.frame_count == 1


def test_batches_of_other_sizes():
    model = engm.GradNormModule(mlp())
    model.compile(backend=BACKEND, fullgraph=True)
    for n in (5, 4, 1):
        x = tensor(n, 6)
        losses = random_losses(model(x))
        assert_measured(engm.measure(model, losses), truth(mlp(), lambda net, x=x: random_losses(net(x))))


def test_the_network_stays_as_it_is():
    x = tensor(5, 6)
    net = mlp()
    model = engm.GradNormModule(net)
    counter = CompileCounterWithBackend(BACKEND)
    model.compile(backend=counter)
    random_losses(model(x))
    assert counter.frame_count == 1
    assert net._compiled_call_impl is None
    assert list(model.state_dict()) == list(mlp().state_dict())
    copied = copy.deepcopy(model)
    assert_measured(engm.measure(copied, random_losses(copied(x))), truth(mlp(), lambda net: random_losses(net(x))))
    net(x)
    copied(x)
    assert counter.frame_count == 1


def test_input_gradients_and_the_plain_backward_pass():
    x = tensor(5, 6).requires_grad_()
    plain, model = mlp(), engm.GradNormModule(mlp())
    model.compile(backend=BACKEND, fullgraph=True)
    losses = random_losses(model(x))
    expected = torch.autograd.grad(random_losses(plain(x)).sum(), [x, *plain.parameters()])
    assert relative(engm.measure(model, losses, x).input_grads, expected[0]) <= 1e-12
    losses.sum().backward()
    for parameter, gradient in zip(model.parameters(), expected[1:], strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(parameter.grad_fn is None for parameter in model.parameters())


def test_reweighting():
    x = tensor(5, 6)
    models = [engm.GradNormModule(mlp()) for _ in range(2)]
    models[1].compile(backend=BACKEND, fullgraph=True)
    gradients = []
    for model in models:
        opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=1.0)
        opt.reweight(random_losses(model(x))).mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


# -- uncompiled calls between captured ones ------------------------------------------------------------------------


def test_attack_steps_between_training_steps():
    """Graphs without taps, of paused and of evaluation passes, are never taken for those with them, or the reverse."""
    x = tensor(5, 6)
    expected = truth(mlp(), lambda net: random_losses(net(x)))
    counter = CompileCounterWithBackend(BACKEND)
    model = engm.GradNormModule(mlp())
    model.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        with model.paused():
            random_losses(model(x)).sum().backward()
        with torch.no_grad():
            model(x)
        assert_measured(engm.measure(model, random_losses(model(x))), expected)
    assert counter.frame_count == 3


def test_compiled_around_the_wrapper_for_evaluation():
    x = tensor(5, 6)
    model = engm.GradNormModule(mlp())
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), mlp()(x))
    with model.paused():
        torch.testing.assert_close(compiled(x), mlp()(x))


def test_compiled_around_the_wrapper_for_training():
    """Captured passes run uncompiled there, and say so."""
    x = tensor(5, 6)
    expected = truth(mlp(), lambda net: random_losses(net(x)))
    model = engm.GradNormModule(mlp())
    compiled = torch.compile(model, backend=BACKEND)
    with model.paused():
        compiled(x)
    with pytest.warns(UserWarning, match=r"model\.compile\(\)"):
        losses = random_losses(compiled(x))
    assert_measured(engm.measure(compiled, losses), expected)
    whole_step = torch.compile(lambda x: random_losses(model(x)), backend=BACKEND)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_measured(engm.measure(model, whole_step(x)), expected)


def test_compiled_loss():
    x = tensor(5, 6)
    expected = truth(mlp(), lambda net: random_losses(net(x)))
    model = engm.GradNormModule(mlp())
    losses = torch.compile(random_losses, backend=BACKEND)(model(x))
    assert_measured(engm.measure(model, losses), expected)


@pytest.mark.slow
def test_compiled_optimizer_step():
    x = tensor(5, 6)
    model, plain = engm.GradNormModule(mlp()), mlp()
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), alpha=1.0)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    step = torch.compile(opt.step, backend=BACKEND)
    for _ in range(2):
        expected = truth(plain, lambda net: random_losses(net(x)))
        update = expected.update((1.0 / expected.norms).clamp(max=1))
        for name, parameter in plain.named_parameters():
            parameter.grad = update[name]
        sgd.step()
        opt.zero_grad()
        opt.backward(random_losses(model(x)))
        step()
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))


# -- batch norm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "options"),
    [("whole", {}), ("part", {"affine": False}), ("layer", {}), ("layer", {"track_running_stats": False})],
    ids=str,
)
def test_batch_norm_with_statistics_of_the_batch(which, options):
    """It runs uncompiled, with a break of the graph around it."""
    x = tensor(5, 6)
    expected = truth(normed(**options), lambda net: random_losses(net(x)), frozen=True)
    net = normed(**options)
    {"whole": net, "part": net[1], "layer": net[1][0]}[which].compile(backend=BACKEND)
    model = engm.GradNormModule(net, batch_norm="frozen")
    measured = engm.measure(model, random_losses(model(x)))
    assert measured.mode == "frozen"
    assert_measured(measured, expected)


def test_batch_norm_with_running_statistics_is_compiled():
    x = tensor(5, 6)
    net = normed().eval()
    net[1][0].running_mean.copy_(tensor(8))
    expected = truth(net, lambda net: random_losses(net(x)))
    model = engm.GradNormModule(net)
    model.compile(backend=BACKEND, fullgraph=True)
    assert_measured(engm.measure(model, random_losses(model(x))), expected)


def test_batch_norm_does_not_go_into_one_graph():
    model = engm.GradNormModule(normed())
    model.compile(backend=BACKEND, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="takes statistics from the batch"):
        model(tensor(5, 6))


# -- what cannot be seen ---------------------------------------------------------------------------------------------


class Direct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale = nn.Linear(6, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.a(x) * self.scale


def test_parameters_of_modules_without_a_rule():
    """The module is left out of the regions around it, and run again for its per-example gradients."""
    x = tensor(5, 6)
    net = nn.Sequential(nn.Linear(6, 6), Direct(), nn.Tanh(), nn.Linear(3, 2)).double()
    expected = truth(net, lambda net: random_losses(net(x)))
    model = engm.GradNormModule(net)
    model.compile(backend=BACKEND)
    losses = random_losses(model(x))
    assert_measured(engm.measure(model, losses), expected)
    assert_step(model, losses, expected)


class Table(nn.Module):
    """Rows of a layer's weight, taken from outside of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a = nn.Embedding(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.a(x * self.table.weight[2])


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        return self.a(x) + F.linear(x.sin(), self.a.weight)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        hidden = self.a(x)
        return hidden - hidden.mean(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [(Table, "'table.weight' outside of layer calls"), (Beside, "'a.weight' are used in more ways")],
    ids=["table", "beside"],
)
@pytest.mark.parametrize("strict", [True, False])
def test_parameters_used_outside_of_layers(make, message, strict):
    model = engm.GradNormModule(make().double(), strict=strict)
    model.compile(backend=BACKEND)
    losses = random_losses(model(tensor(5, 6)))
    with pytest.raises(RuntimeError, match=message):
        engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=1.0).backward(losses)
    assert all(parameter.grad is None for parameter in model.parameters())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.attention = nn.Linear(6, 4), nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = torch.tanh(self.before(x))
        return self.attention(x, x, x, need_weights=False)[0].sin()


def test_the_remedy():
    """A module whose parameters no layer call accounts for, left out of the regions around it."""
    x = tensor(3, 5, 6)
    net = Attention().double()
    expected = truth(net, lambda net: random_losses(net(x)))
    model = engm.GradNormModule(net)
    model.compile(backend=BACKEND)
    with pytest.raises(RuntimeError, match=r"'attention\.out_proj\.bias'.*torch\.compiler\.disable"):
        engm.measure(model, random_losses(model(x)))
    net.attention.forward = torch.compiler.disable(net.attention.forward)
    assert_measured(engm.measure(model, random_losses(model(x))), expected)


def test_examples_mixed_inside():
    model = engm.GradNormModule(Mixing().double())
    model.compile(backend=BACKEND)
    with pytest.raises(RuntimeError, match=r"layer 'a' \(Linear\) for some examples influences"):
        engm.measure(model, random_losses(model(tensor(5, 6))))


def test_compiled_before_it_was_wrapped():
    x = tensor(5, 6)
    net = whole(mlp())
    net(x)
    model = engm.GradNormModule(net, strict=False)
    with pytest.raises(RuntimeError, match=r"torch\.compiler\.reset\(\)"):
        engm.measure(model, random_losses(model(x)))
    torch.compiler.reset()
    expected = truth(mlp(), lambda net: random_losses(net(x)))
    assert_measured(engm.measure(model, random_losses(model(x))), expected)


def test_backends_without_a_backward_graph_are_refused():
    model = engm.GradNormModule(mlp())
    model.compile(backend="eager")
    with pytest.raises(RuntimeError, match="backend='eager'"):
        engm.measure(model, random_losses(model(tensor(5, 6))))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False)


def test_checkpoints_inside():
    x = tensor(5, 6)
    expected = truth(Checkpointed(), lambda net: random_losses(net(x)))
    model = engm.GradNormModule(Checkpointed())
    model.compile(backend=BACKEND)
    assert_measured(engm.measure(model, random_losses(model(x))), expected)


def test_checkpoints_around_a_region():
    """Torch finds that what is run again has no taps; what must not happen is a norm without it."""
    net = Checkpointed()
    net.net.compile(backend=BACKEND)
    model = engm.GradNormModule(net, strict=False)
    losses = random_losses(model(tensor(5, 6)))
    with pytest.raises(CheckpointError, match="different number of tensors"):
        engm.measure(model, losses)


def test_a_call_that_was_never_noted():
    """A backward pass that reaches a tap whose forward ran when nothing was captured is no silent miss."""
    model = engm.GradNormModule(mlp())
    model.compile(backend=BACKEND)
    losses = random_losses(model(tensor(5, 6)))
    (token,) = trace(losses).tokens.values()
    never = torch.ops.engm.note_call(losses.detach(), losses.detach(), token.detach(), torch.zeros_like(token), "0")
    segment_of(token).recording.capture.collector = object()
    with pytest.raises(RuntimeError, match="layer '0' was run again"):
        torch.ops.engm.hand_backprops(losses.detach(), losses.detach(), token.detach(), never, "0")


class Waiting(nn.Module):
    """Two regions with a break between them, at which a function is called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)
        self.between = lambda: None

    def forward(self, x):
        x = self.first(x)
        torch.compiler.disable(self.between)()
        return self.second(x)


def test_two_threads_at_once():
    x = tensor(5, 6)
    net = Waiting().double()
    model = engm.GradNormModule(net)
    model.compile(backend=BACKEND)
    model(x)
    started, resume, errors = threading.Event(), threading.Event(), []

    def other() -> None:
        try:
            model(x)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    net.between = lambda: (started.set(), resume.wait(20)) if threading.current_thread() is thread else outer()

    def outer() -> None:
        thread.start()
        started.wait(20)

    with pytest.raises(RuntimeError, match="two threads"):
        model(x)
    resume.set()
    thread.join()
    net.between = lambda: None
    expected = truth(net, lambda net: random_losses(net(x)))
    assert_measured(engm.measure(model, random_losses(model(x))), expected)


# -- lifetimes, precision --------------------------------------------------------------------------------------------


def test_nothing_outlives_the_graph():
    x = tensor(5, 6)
    model = engm.GradNormModule(mlp())
    model.compile(backend=BACKEND, fullgraph=True)
    for _ in range(3):
        losses = random_losses(model(x))
        engm.measure(model, losses)
    gc.collect()
    assert sum(type(thing) is CompiledCall for thing in gc.get_objects()) == 4
    del losses
    gc.collect()
    assert not any(type(thing) is CompiledCall for thing in gc.get_objects())
    assert not any(module._forward_hooks for module in model.unwrap().modules())


def test_autocast_inside():
    x = tensor(5, 6, dtype=torch.float32)
    models = [engm.GradNormModule(mlp().float()) for _ in range(2)]
    models[1].compile(backend=BACKEND, fullgraph=True)
    norms = []
    for model in models:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = random_losses(model(x).float())
        norms.append(engm.measure(model, losses).norms)
    assert relative(norms[1], norms[0]) <= TOLERANCE["norm, bfloat16"]


def chain() -> nn.Sequential:
    """Of equal layers: the gradients of all their outputs fit into one another's memory."""
    return nn.Sequential(*[layer for _ in range(5) for layer in (nn.Linear(6, 6), nn.Tanh())])


@pytest.mark.slow
@pytest.mark.parametrize(("make", "shape"), [(Block, (3, 3, 9)), (Twice, (4, 6)), (chain, (33, 6))])
def test_inductor(make, shape):
    """The real thing: its code writes into the memory of operands that were handed over."""
    x = tensor(*shape)
    net = make().double()
    expected = truth(net, lambda net: random_losses(net(x)))
    model = engm.GradNormModule(net)
    model.compile(fullgraph=True)
    for _ in range(2):
        losses = random_losses(model(x))
        assert_measured(engm.measure(model, losses), expected)
        assert_step(model, losses, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_two_losses_in_each_others_place(compiled):
    """Every pair of six, of which half of the losses, drawn once, would not tell all apart."""
    x = tensor(6, 6)
    for i, j in itertools.combinations(range(6), 2):
        model = engm.GradNormModule(mlp())
        if compiled:
            model.compile(backend=BACKEND)
        order = list(range(6))
        order[i], order[j] = j, i
        with pytest.raises(RuntimeError, match="influences the losses of other examples"):
            engm.measure(model, random_losses(model(x))[order])
