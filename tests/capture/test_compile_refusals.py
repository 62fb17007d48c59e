"""What torch.compile hides from the wrapper: it is found all the same, or refused by name, and never missed."""

import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from compiled import BACKEND, assert_refused, mlp, whole
from engine_checks import assert_measured, assert_step
from oracle import random_losses, relative, tensor, truth
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import engm
from engm._C import GradientQueue
from engm.capture.compiled import segment_of
from engm.graph.trace import trace

pytestmark = [pytest.mark.usefixtures("nothing_compiled"), pytest.mark.torch_insides]


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
    """A network that takes a row of a layer's weight outside of the layer."""

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
    """A module whose parameters no layer call accounts for has to be left out of the regions around it."""
    x = tensor(3, 5, 6)
    net = Attention().double()
    expected = truth(net, lambda net: random_losses(net(x)))
    model = engm.GradNormModule(net)
    model.compile(backend=BACKEND)
    message = r"'attention\.out_proj\.bias'.*torch\.compiler\.disable"
    assert_refused(lambda: engm.measure(model, random_losses(model(x))), expected, RuntimeError, message)
    net.attention.forward = torch.compiler.disable(net.attention.forward)
    assert_measured(engm.measure(model, random_losses(model(x))), expected)


def test_examples_mixed_inside():
    model = engm.GradNormModule(Mixing().double())
    model.compile(backend=BACKEND)
    with pytest.raises(RuntimeError, match=r"layer 'a' \(Linear\) for some examples influences"):
        engm.measure(model, random_losses(model(tensor(5, 6))))


def test_compiled_before_it_was_wrapped(monkeypatch):
    """In a process in which no captured pass has run, so that regions are compiled for modules with any hooks."""
    monkeypatch.setattr(torch._dynamo.config, "skip_nnmodule_hook_guards", True)
    x = tensor(5, 6)
    net = whole(mlp())
    net(x)
    model = engm.GradNormModule(net, strict=False)
    expected = truth(mlp(), lambda net: random_losses(net(x)))
    message = r"torch\.compiler\.reset\(\)"
    assert_refused(lambda: engm.measure(model, random_losses(model(x))), expected, RuntimeError, message)
    torch.compiler.reset()
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
    """Torch finds that the region which runs again has no taps; a norm that lacks the region must not come out."""
    x = tensor(5, 6)
    net = Checkpointed()
    expected = truth(net, lambda net: random_losses(net(x)))
    net.net.compile(backend=BACKEND)
    model = engm.GradNormModule(net, strict=False)
    losses = random_losses(model(x))
    assert_refused(lambda: engm.measure(model, losses), expected, CheckpointError, "different number of tensors")


def test_a_call_that_was_never_noted():
    """A backward pass that reaches a tap whose forward pass was not captured raises."""
    model = engm.GradNormModule(mlp())
    model.compile(backend=BACKEND)
    losses = random_losses(model(tensor(5, 6)))
    (token,) = trace(losses).tokens.values()
    never = torch.ops.engm.note_call(losses.detach(), losses.detach(), token.detach(), torch.zeros_like(token), "0")
    segment_of(token).recording.capture.queue = GradientQueue(object(), 0)
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


@pytest.mark.parametrize("compiled", [False, True])
def test_two_losses_in_each_others_place(compiled):
    """Every pair of six losses is tried."""
    x = tensor(6, 6)
    for i, j in itertools.combinations(range(6), 2):
        model = engm.GradNormModule(mlp())
        if compiled:
            model.compile(backend=BACKEND)
        order = list(range(6))
        order[i], order[j] = j, i
        losses = random_losses(model(x))[order]
        assert relative(engm.measure(model, losses).norms, engm.naive_grad_norms(model, losses)) <= 1e-9
