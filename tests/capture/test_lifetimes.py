"""How long captured calls live, and that nothing else is left behind."""

import gc
import weakref

import pytest
import torch
from engine_checks import assert_measured, check
from little_network import Net, X, losses_of, net_and_model
from oracle import relative, tensor, truth
from torch import nn
from torch.utils.checkpoint import checkpoint

import engm
from engm.graph.trace import trace

pytestmark = pytest.mark.torch_insides


def traces_of(net):
    """Everything that lies on the modules of a network, its tensors aside."""
    modules = [
        (name, sorted(vars(module)), {k: len(v) for k, v in vars(module).items() if "hook" in k and v is not None})
        for name, module in net.named_modules()
    ]
    return modules + [(name, sorted(vars(p)), p._backward_hooks) for name, p in net.named_parameters()]


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
    """Reference counts alone free the calls: no cycle keeps activations until the garbage collector comes."""
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
    with pytest.raises(RuntimeError, match=r"modified in place|modified by an inplace"):
        engm.measure(model, losses)


def test_measure_after_backward_is_one_clear_error():
    _, model = net_and_model()
    losses = losses_of(model)
    losses.sum().backward()
    with pytest.raises(RuntimeError, match=r"already backpropagated|second time"):
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
    """Reentrant checkpointing hides layers from the graph, so that their norms would silently be 0."""
    model = engm.GradNormModule(Checkpointed(True, part).double().eval())
    losses = losses_of(model, X.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        engm.measure(model, losses)
