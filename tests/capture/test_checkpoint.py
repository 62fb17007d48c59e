"""Activation checkpointing: layers that run again in the backward pass are counted once, and rightly."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from engine_checks import TOLERANCE, assert_measured, assert_step, check
from hypothesis import given
from hypothesis import strategies as st
from oracle import per_example_gradients, random_losses, relative, tensor, trained, truth
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)
from training import assert_same

import engm

pytestmark = pytest.mark.torch_insides

keep = partial(checkpoint, use_reentrant=False)


class Nested(nn.Module):
    """Runs its parts in order; a list among them is a checkpoint around what it holds."""

    def __init__(self, *parts) -> None:
        super().__init__()
        self.parts = nn.ModuleList([part if isinstance(part, nn.Module) else Nested(*part) for part in parts])
        self.again = [not isinstance(part, nn.Module) for part in parts]

    def forward(self, x):
        for part, again in zip(self.parts, self.again, strict=True):
            x = keep(part, x) if again else part(x)
        return x


def norm(kind: str, channels: int) -> nn.Module:
    return {
        "batch": lambda: nn.BatchNorm1d(channels),
        "group": lambda: nn.GroupNorm(2, channels),
        "layer": lambda: nn.LayerNorm(7),
        "rms": lambda: nn.RMSNorm((channels, 7)),
        "instance": lambda: nn.InstanceNorm1d(channels, affine=True),
    }[kind]()


def conv(into: int, out: int) -> nn.Conv1d:
    return nn.Conv1d(into, out, 3, padding=1)


@pytest.mark.parametrize("kind", ["batch", "group", "layer", "rms", "instance"])
@pytest.mark.parametrize("training", [True, False])
def test_norms_inside(kind, training):
    torch.manual_seed(1)
    net = Nested(conv(3, 4), [norm(kind, 4), nn.ReLU(inplace=True), conv(4, 4)], [norm(kind, 4), [conv(4, 2)]]).double()
    x = tensor(5, 3, 7)
    check(net.train(training), lambda net: random_losses(net(x)), frozen=kind == "batch" and training)


class Scaled(nn.Module):
    """Parameters that enter by operators: what the layer norm saves first is a parameter, which no one computes anew.

    Attributes:
        again: whether it runs in a checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))
        self.weight, self.again = nn.Parameter(torch.randn(4, 8)), True

    def scaled(self, x):
        return torch.tanh(F.layer_norm(torch.tanh(x @ self.weight), (8,), self.gain, self.shift)) * self.gain

    def forward(self, x):
        return (keep(self.scaled, x) if self.again else self.scaled(x)).mean(1)


def test_parameters_that_enter_by_operators():
    torch.manual_seed(0)
    check(nn.Sequential(Scaled(), nn.Linear(8, 3)).double(), lambda net: random_losses(net(tensor(4, 5, 4))))


def test_checkpoints_that_come_and_go():
    torch.manual_seed(0)
    net = nn.Sequential(Scaled(), nn.Linear(8, 3)).double()
    model = engm.GradNormModule(net)
    for step, again in enumerate((False, True, True, False)):
        net[0].again = again
        losses = random_losses(model(tensor(4, 5, 4, seed=step)))
        found = engm.per_example_grad_norms(model, losses)
        torch.testing.assert_close(found, engm.naive_grad_norms(model, losses), msg=f"step {step}")


@st.composite
def networks(draw, depth: int = 2):
    """A list of layers of width 4 on ``[n, 4, T]``, some of them in checkpoints, and those in others."""
    layers = [
        lambda: conv(4, 4),
        lambda: nn.Conv1d(4, 4, 1, groups=2, bias=False),
        lambda: nn.GroupNorm(2, 4),
        nn.Tanh,
        lambda: nn.ReLU(inplace=True),
    ]
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        nested = depth > 0 and draw(st.booleans())
        parts.append(draw(networks(depth - 1)) if nested else draw(st.sampled_from(layers))())
    return parts


@given(networks(), st.integers(1, 4), st.integers(2, 6))
def test_any_nesting(parts, n, length):
    torch.manual_seed(2)
    net = Nested(conv(4, 4), *parts).double()
    x = tensor(n, 4, length)
    check(net, lambda net: random_losses(net(x)))


class Tied(nn.Module):
    """One layer in two checkpoints, twice in one of them, and outside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = keep(lambda x: torch.tanh(self.a(torch.tanh(self.a(x)))), x)
        return self.b(self.a(keep(lambda x: self.a(x).sin(), x)))


def test_layers_in_several_checkpoints():
    x = tensor(4, 6)
    check(Tied().double(), lambda net: random_losses(net(x)))


def test_dropout_inside():
    """The same positions are dropped when the layers run again."""
    x = tensor(6, 6)
    net = Nested(
        nn.Linear(6, 8), [nn.Dropout(0.5), nn.Linear(8, 8), [nn.Dropout(0.3), nn.ReLU()]], nn.Linear(8, 3)
    ).double()

    def losses(net):
        torch.manual_seed(3)
        return random_losses(net(x))

    check(net, losses)


def test_the_user_draws_random_numbers_in_between():
    x = tensor(6, 6)
    net = Nested([nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)]).double()
    torch.manual_seed(3)
    expected = truth(net, lambda net: random_losses(net(x)))
    model = engm.GradNormModule(net)
    torch.manual_seed(3)
    losses = random_losses(model(x))
    torch.manual_seed(77)
    torch.rand(5)
    state = torch.get_rng_state()
    assert_measured(engm.measure(model, losses), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_sequential():
    x = tensor(4, 6)
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)

    check(Net().double(), lambda net: random_losses(net(x)))


@pytest.mark.parametrize("layer", [nn.Linear(6, 8), nn.LSTM(6, 8)], ids=["a tensor", "a nest of tensors"])
def test_selective(layer):
    """Some operators' results are kept, the others run again; torch allows one backward pass, and it takes several."""

    def policy(ctx, operator, *args, **kwargs):
        kept = operator == torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(layer)

        def forward(self, x):
            return keep(self.net, x, context_fn=partial(create_selective_checkpoint_contexts, policy))

    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"layer 'net.0' .* selective checkpoint .*Leave context_fn out"):
            engm.GradNormModule(Net(), strict=strict)(tensor(5, 4, 6, dtype=torch.float32))


@pytest.mark.parametrize("early_stop", [True, False])
def test_early_stop(early_stop):
    x = tensor(4, 6)
    net = Nested(nn.Linear(6, 8), [nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8)], nn.Linear(8, 3)).double()
    with set_checkpoint_early_stop(early_stop):
        check(net, lambda net: random_losses(net(x)))


def test_autocast_inside():
    x = tensor(4, 6, dtype=torch.float32)
    net = Nested(nn.Linear(6, 8), [nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8)], nn.Linear(8, 3))
    model = engm.GradNormModule(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = random_losses(model(x).float())
    assert (
        relative(engm.measure(model, losses).norms, engm.naive_grad_norms(model, losses)) <= TOLERANCE["norm, bfloat16"]
    )


def test_the_wrapper_itself_in_a_checkpoint():
    x = tensor(4, 6).requires_grad_()
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    expected = truth(net, lambda net: random_losses(net(x)))
    model = engm.GradNormModule(net)
    losses = random_losses(keep(model, x))
    assert_measured(engm.measure(model, losses), expected)
    assert_step(model, losses, expected)


def test_measured_again_and_then_reweighted():
    x = tensor(4, 6)
    net = Nested(nn.Linear(6, 8), [nn.GELU(), nn.Linear(8, 3)]).double()
    expected = truth(net, lambda net: random_losses(net(x)))
    model = engm.GradNormModule(net)
    losses = random_losses(model(x))
    for _ in range(2):
        assert_measured(engm.measure(model, losses), expected)
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=1.0)
    opt.reweight(losses).mean().backward()
    wanted = expected.update((1.0 / expected.norms).clamp(max=1))
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name])


def test_layers_run_once_more_for_every_backward_pass():
    calls = []

    class Counting(nn.Linear):
        pass

    layer = Counting(6, 6).double()
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    model = engm.GradNormModule(Nested([nn.Tanh(), layer, nn.Tanh()], nn.Linear(6, 3)).double())
    losses = random_losses(model(tensor(4, 6)))
    engm.measure(model, losses)  # the first look at a structure is a pass of its own
    calls.clear()
    losses = random_losses(model(tensor(4, 6)))
    assert len(calls) == 1
    engm.measure(model, losses)
    assert len(calls) == 2
    losses.sum().backward()
    assert len(calls) == 3


# -- reentrant checkpoints ------------------------------------------------------------------------------------------


class Reentrant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(checkpoint(lambda x: F.relu(self.a(x)), x, use_reentrant=True))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("call", ["measure", "norms", "backward", "reweight"])
def test_reentrant_is_refused(call, strict):
    """Torch runs it in ``.backward()`` alone, together with all parameter gradients: no norm pass is possible."""
    model = engm.GradNormModule(Reentrant().double(), strict=strict)
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=1.0)
    losses = random_losses(model(tensor(4, 6).requires_grad_()))
    calls = {
        "measure": lambda: engm.measure(model, losses),
        "norms": lambda: engm.per_example_grad_norms(model, losses),
        "backward": lambda: opt.backward(losses),
        "reweight": lambda: opt.reweight(losses),
    }
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        calls[call]()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_reentrant_around_what_is_frozen():
    """Nothing inside is measured, so nothing is missing, though the losses' graph runs through the checkpoint."""
    net = Reentrant().double()
    net.a.requires_grad_(False)
    x = tensor(4, 6)
    check(net, lambda net: random_losses(net(x)))


class Gains(nn.Module):
    """Parameters of its own in five operators, in a checkpoint; counts how often it runs."""

    def __init__(self):
        super().__init__()
        self.gains, self.mixed = nn.Parameter(torch.rand(4, 6)), nn.Parameter(torch.rand(6, 6))
        self.runs = 0

    def inside(self, x):
        self.runs += 1
        for gain in self.gains:
            x = torch.tanh(x * gain)
        return x @ self.mixed

    def forward(self, x):
        return checkpoint(self.inside, x, use_reentrant=False).sin()


def test_what_operators_read_is_computed_anew_once():
    torch.manual_seed(0)
    block = Gains()
    model = engm.GradNormModule(nn.Sequential(nn.Linear(3, 6), block, nn.Linear(6, 2)).double())
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.1), alpha=1.0)
    for step in range(3):
        losses = model(tensor(5, 3, seed=step)).square().sum(1)
        wanted = per_example_gradients(losses, trained(model.unwrap())).norms
        block.runs = 0
        assert relative(opt.backward(losses).norms, wanted) <= 1e-12
        opt.step()
        opt.zero_grad()
    assert block.runs == 2, "by the pass, and for all that is read"


# -- how often a checkpoint runs --------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Every row goes to two of four experts, as its own numbers tell; in a checkpoint; counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(6, 4), nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.runs = 0

    def inside(self, x):
        self.runs += 1
        rows = x.flatten(0, 1)
        shares, chosen = self.router(rows).softmax(1).topk(2, 1)
        found = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == number)
            found = found.index_add(0, row, expert(rows[row]).tanh() * shares[row, slot, None])
        return x + found.view_as(x)

    def forward(self, x):
        return keep(self.inside, x)


def test_routes_are_read_in_one_run():
    torch.manual_seed(0)
    blocks = [Experts() for _ in range(6)]
    net = nn.Sequential(nn.Linear(3, 6), *blocks, nn.Linear(6, 2)).double()
    x = tensor(5, 7, 3)
    expected, runs = truth(net, lambda net: random_losses(net(x))), []
    model = engm.GradNormModule(net)
    for _ in range(3):
        losses = random_losses(model(x))
        for block in blocks:
            block.runs = 0
        found = engm.per_example_grad_norms(model, losses)
        assert relative(found, expected.norms) <= 1e-12
        runs.append([block.runs for block in blocks])
    assert max(runs[0]) <= 6, "four passes, the nodes that the plan is made from, perhaps some of them once more"
    assert runs[1:] == [[2] * 6] * 2, "by the pass, and for the routes that are compared"


class Biased(nn.Module):
    """Attention with a bias from a table of its own, in a checkpoint; counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.table = nn.Linear(6, 18), nn.Embedding(9, 2)
        self.runs = 0

    def inside(self, x):
        self.runs += 1
        q, k, v = self.mixed(x).view(len(x), 5, 3, 2, 3).permute(2, 0, 3, 1, 4)
        places = torch.arange(5)[:, None] - torch.arange(5) + 4
        scores = q @ k.mT + self.table(places).permute(2, 0, 1)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def forward(self, x):
        return keep(self.inside, x)


def weight_normed() -> nn.Module:
    """Layers whose weights are computed from parameters, in one checkpoint."""
    layers = [nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)) for _ in range(3)]
    return nn.Sequential(*layers)


class WeightNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.runs = weight_normed(), 0

    def inside(self, x):
        self.runs += 1
        return self.layers(x).tanh()

    def forward(self, x):
        return keep(self.inside, x)


@pytest.mark.parametrize("kind", [Biased, WeightNormed])
def test_runs_hang_not_on_how_many_examples_there_are(kind):
    """What is pulled back to parameters goes through the checkpoint again, for all examples at once."""
    runs = []
    for n in (3, 11):
        torch.manual_seed(0)
        block = kind()
        net = nn.Sequential(nn.Linear(3, 6), block, nn.Linear(6, 2)).double()
        x = tensor(n, 5, 3)
        expected = truth(net, lambda net: random_losses(net(x)))  # noqa: B023
        model = engm.GradNormModule(net)
        opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.0), alpha=1.0)
        for _ in range(3):
            losses = random_losses(model(x))
            block.runs = 0
            assert relative(opt.backward(losses).norms, expected.norms) <= 1e-12
        runs.append(block.runs)
    assert runs == [3, 3], "by the pass, for what is read and pulled back for norms, and for the gradient"


class Normed(nn.Module):
    """Instance norms in a checkpoint, which are batch norms outside of calls; counts how often it runs."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.norms = nn.Sequential(*(nn.InstanceNorm1d(6, affine=True) for _ in range(count)))
        self.runs = 0

    def inside(self, x):
        self.runs += 1
        return self.norms(x).tanh()

    def forward(self, x):
        return keep(self.inside, x)


def test_statistics_are_asked_for_when_nodes_have_used_them_up():
    """In a pass to the inputs, which runs through the nodes."""
    runs, x = [], tensor(3, 6, 5).requires_grad_()
    for count in (1, 4):
        net = Normed(count).double()
        model = engm.GradNormModule(net)
        for _ in range(2):
            losses = random_losses(model(x))
            net.runs = 0
            found = engm.measure(model, losses, inputs=x)
        runs.append(net.runs)
        assert_measured(found, truth(net, lambda net: random_losses(net(x))))
        wanted = torch.stack([torch.autograd.grad(loss, x, retain_graph=True)[0].norm() for loss in losses])
        torch.testing.assert_close(found.input_norms, wanted)
    assert runs[0] == runs[1], "however many norms there are"


def test_graph_is_whole_after_it_was_measured():
    """A second backward pass, and one through the gradients, go through what ran again."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), Experts(), Biased(), nn.Linear(6, 2)).double()
    x, parameters = tensor(4, 5, 3), list(net.parameters())
    model = engm.GradNormModule(net)

    def twice(losses):
        torch.autograd.grad(losses.sum(), parameters, retain_graph=True)
        gradients = torch.autograd.grad(losses.sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters, allow_unused=True)

    losses = random_losses(model(x))
    for _ in range(2):
        engm.per_example_grad_norms(model, losses)
    for found, wanted in zip(twice(losses), twice(random_losses(net(x))), strict=True):
        torch.testing.assert_close(found, wanted)


class Statistics(nn.Module):
    """Layers with running statistics, and a number that counts how often they ran, in a checkpoint or not."""

    def __init__(self, again, norm):
        super().__init__()
        self.again, self.first, self.last = again, conv(3, 4), nn.Linear(28, 3)
        self.norm = norm
        self.register_buffer("runs", torch.zeros(()))

    def inner(self, x):
        self.runs += 1
        return torch.tanh(self.norm(self.first(x)))

    def forward(self, x):
        return self.last((keep(self.inner, x) if self.again else self.inner(x)).flatten(1))


class TestRunningStatistics:
    """Passes of ours, which run checkpoints again, leave buffers to the training step's own passes."""

    @pytest.mark.parametrize("borrowed", [False, True])
    @pytest.mark.parametrize("method", [engm.ENGM, engm.AENGM])
    def test_of_batch_norms_are_those_of_training_without_us(self, method, borrowed):
        torch.manual_seed(0)
        ours = Statistics(True, nn.BatchNorm1d(4)).double()
        theirs = copy.deepcopy(ours)
        model = engm.GradNormModule(ours, check_every=2, calibrate_every=2)
        opt = method(model, torch.optim.SGD(model.parameters(), 0.0), 1e9)
        for step in range(5):
            x = tensor(6, 3, 7, seed=step).requires_grad_()
            measurement = engm.measure(model, random_losses(model(x)), x) if borrowed else None
            if borrowed:
                theirs(x)
            opt.backward(random_losses(model(x)), x, measurement=measurement)
            random_losses(theirs(x)).mean().backward()
            for (name, mine), other in zip(ours.named_buffers(), theirs.buffers(), strict=True):
                assert relative(mine, other) <= 1e-12, (step, name)

    @pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
    def test_measuring_leaves_them_alone(self, kind):
        torch.manual_seed(0)
        net = Statistics(True, kind(4, affine=True, track_running_stats=True)).double()
        model = engm.GradNormModule(net, calibrate_every=1)
        x = tensor(6, 3, 7).requires_grad_()
        for _ in range(3):
            losses = random_losses(model(x))
            before = copy.deepcopy(net.state_dict())
            engm.per_example_grad_norms(model, losses)
            engm.measure(model, losses, x)
            engm.measure(model, losses, x, norms=False)
            assert_same(net.state_dict(), before)
            losses.sum().backward()  # and the graph is as usable as it was

    def test_of_layers_in_one_pass_are_of_the_forward_pass(self):
        net = Statistics(True, nn.InstanceNorm1d(4, track_running_stats=True)).double()
        model = engm.GradNormModule(net, check_every=2)
        opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), 0.1), 1.0)
        for step in range(5):
            opt.backward(random_losses(model(tensor(6, 3, 7, seed=step))))
            opt.step()
            assert int(net.runs) == step + 1
