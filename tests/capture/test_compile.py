"""torch.compile of the network, of its parts and of what surrounds the wrapper: no norm may be wrong."""

import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from compiled import BACKEND, TORCH, mlp
from engine_checks import TOLERANCE, assert_measured, assert_step
from oracle import random_losses, relative, tensor, truth
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import engm
from engm.capture.compiled import CompiledCall

pytestmark = [pytest.mark.usefixtures("nothing_compiled"), pytest.mark.torch_insides]


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
    """Captured passes run uncompiled there, and a warning says so."""
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
    """The batch norm runs uncompiled, with a break of the graph around it."""
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
    """A chain of equal layers: the gradients of all their outputs fit into one another's memory."""
    return nn.Sequential(*[layer for _ in range(5) for layer in (nn.Linear(6, 6), nn.Tanh())])


attention_in_float64 = pytest.mark.xfail(
    TORCH == (2, 11), raises=RuntimeError, reason="torch 2.11 alone fails too: Inductor makes float32 of its attention"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "shape"), [pytest.param(Block, (3, 3, 9), marks=attention_in_float64), (Twice, (4, 6)), (chain, (33, 6))]
)
def test_inductor(make, shape):
    """Inductor's code writes into the memory of operands that were handed over; the norms must not notice."""
    x = tensor(*shape)
    net = make().double()
    expected = truth(net, lambda net: random_losses(net(x)))
    model = engm.GradNormModule(net)
    model.compile(fullgraph=True)
    for _ in range(2):
        losses = random_losses(model(x))
        assert_measured(engm.measure(model, losses), expected)
        assert_step(model, losses, expected)
