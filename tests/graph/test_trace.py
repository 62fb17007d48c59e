"""Reading the graph: every captured call is visited, and no parameter gradient is computed on the way."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from engine_checks import assert_measured, check
from hypothesis import given
from hypothesis import strategies as st
from oracle import random_losses, relative, tensor, truth
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import engm
from engm.backward.prepare import planned_losses
from engm.graph.trace import Trace, trace

pytestmark = pytest.mark.torch_insides


class Operators(TorchDispatchMode):
    """Notes every ATen operator with its arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func.overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))

    def count(self, name):
        return sum(seen == name for seen, _ in self.seen)

    def arguments(self, name):
        return [args for seen, args in self.seen if seen == name]


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.Flatten(),
        nn.LayerNorm(4),
        nn.Linear(4, 5),
        nn.ReLU(inplace=True),
        nn.Linear(5, 3),
    ).double()


X = tensor(4, 3, 7, 7)


@pytest.mark.parametrize("training", [False, True])
def test_no_weight_gradient_is_computed(training):
    model = engm.GradNormModule(convolutional().train(training))
    losses = random_losses(model(X))
    engm.measure(model, losses)  # the strict check is behind us
    with Operators() as operators:
        engm.measure(model, losses)
    masks = [args[10] for args in operators.arguments("convolution_backward")]
    assert masks == [[True, False, False]] * 2, "two convolutions pass gradients on, the first does not even run"
    assert [args[9] for args in operators.arguments("native_batch_norm_backward")] == [[True, False, False]]
    assert [args[9] for args in operators.arguments("native_group_norm_backward")] == [[True, False, False]]
    assert [args[7] for args in operators.arguments("native_layer_norm_backward")] == [[True, False, False]]
    assert operators.count("mm") == 2, "one input gradient a linear layer"


def test_parameters_and_gradients_are_untouched():
    model = engm.GradNormModule(convolutional().eval())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engm.measure(model, random_losses(model(X)))
    assert all(bool((parameter.grad == 7.0).all()) for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_the_graph_stays_usable_and_gives_the_usual_gradients_bitwise(training, times):
    net = convolutional().train(training)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(random_losses(net(x)).sum(), [x, *net.parameters()])
    net.load_state_dict(state)
    model = engm.GradNormModule(net)
    losses = random_losses(model(x))
    for _ in range(times):
        engm.measure(model, losses, x)
    losses.sum().backward()
    assert torch.equal(x.grad, expected[0])
    for parameter, gradient in zip(net.parameters(), expected[1:], strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_measuring_twice_gives_the_same_bits():
    model = engm.GradNormModule(convolutional())
    losses = random_losses(model(X))
    assert torch.equal(engm.measure(model, losses).stacked, engm.measure(model, losses).stacked)


class Branches(nn.Module):
    """Two towers with their own sinks, a skip, and a layer whose output no loss reads."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Conv1d(1, 4, 2)
        self.unread = nn.Linear(4, 4)
        self.merge, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        left = torch.tanh(self.left(x))
        right = self.right(x.unsqueeze(1)).mean(2)
        self.unread(left)
        merged = self.merge(left) + self.merge(right)
        return self.head(merged) + left[:, :2]


def test_every_call_is_visited():
    net = Branches().double()
    measured = check(net, lambda m: random_losses(m(tensor(3, 4))))
    reached = [name for name, squared in measured.squared_norms.items() if bool((squared > 0).all())]
    assert {name.split(".")[0] for name in reached} == {"left", "right", "merge", "head"}
    assert bool((measured.squared_norms["unread.weight"] == 0).all())


def test_sinks_are_the_calls_with_none_behind_them():
    net = Branches().double()
    model = engm.GradNormModule(net)
    found = planned_losses(model, random_losses(model(tensor(3, 4))))
    assert [call.name for call in found.trace.calls].index("head") == 0
    assert len(found.trace.calls) == 5
    assert len(found.plan.sinks) == 2


def test_input_gradients_come_from_the_same_pass():
    net = Branches().double()
    model = engm.GradNormModule(net)
    x = tensor(3, 4).requires_grad_()
    losses = random_losses(model(x))
    (expected,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
    measured = engm.measure(model, losses, x)
    assert relative(measured.input_grads, expected) <= 1e-12
    assert_measured(measured, truth(net, lambda m: random_losses(m(tensor(3, 4)))))


def test_frozen_stem_is_not_entered():
    """Nothing is trained there, so the pass does not go there."""
    net = convolutional().eval()
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)
    model = engm.GradNormModule(net)
    losses = random_losses(model(X))
    engm.measure(model, losses)
    with Operators() as operators:
        engm.measure(model, losses)
    assert operators.count("native_batch_norm_backward") == 0
    assert operators.count("convolution_backward") == 1


def test_a_deep_graph_does_not_hit_the_recursion_limit():
    net = nn.Linear(2, 2).double()

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = net

        def forward(self, x):
            for _ in range(1500):
                x = x + 1e-4 * torch.tanh(self.layer(x))
            return x

    model = engm.GradNormModule(Deep())
    x = tensor(2, 2)
    losses = model(x).sum(1)
    assert relative(engm.measure(model, losses).norms, engm.naive_grad_norms(model, losses)) <= 1e-9


def test_a_call_reached_with_an_undefined_gradient():
    """A use whose gradient never arrives leaves the gradients of the other uses as they are."""

    class Cuts(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1.0

        @staticmethod
        def backward(ctx, gradient):
            return None

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) + Cuts.apply(self.layer(torch.tanh(x)))

    check(Net().double(), lambda m: random_losses(m(tensor(3, 4))))


def test_custom_functions_and_losses_on_the_way():
    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sign()

        @staticmethod
        def backward(ctx, gradient):
            assert gradient.abs().max().item() < 1e9  # cannot be batched
            return gradient

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(Sign.apply(self.a(x)))

    net, y = Net().double(), torch.tensor([0, 2, 1])
    check(net, lambda m: F.cross_entropy(m(tensor(3, 4)), y, reduction="none"))
    model = engm.GradNormModule(net)
    losses = F.cross_entropy(model(tensor(3, 4)), y, reduction="none")
    assert relative(engm.naive_grad_norms(model, losses), engm.measure(model, losses).norms) <= 1e-9


def walked(root):
    """The walk as it is meant: by recursion, inputs from left to right, leaves numbered when their reader is met."""
    order, children, numbers, leaves = [], [], [], []
    met = set()

    def visit(node):
        met.add(node)
        edges = node.next_functions
        own = [child.variable for child, _ in edges if child is not None and type(child).__name__ == "AccumulateGrad"]
        leaves.extend(leaf for leaf in dict.fromkeys(own) if all(leaf is not known for known in leaves))
        for child, _ in edges:
            if child is not None and child not in met and type(child).__name__ != "AccumulateGrad":
                visit(child)
        order.append(node)
        children.append(tuple(place(child) for child, _ in edges))
        outputs = tuple(number for _, number in edges)
        numbers.append(outputs if any(outputs) else ())

    def place(child):
        if child is None:
            return None
        if type(child).__name__ == "AccumulateGrad":
            return -2 - next(k for k, leaf in enumerate(leaves) if leaf is child.variable)
        return order.index(child)

    visit(root.grad_fn)
    return order, children, numbers, leaves


@st.composite
def graphs(draw):
    """Losses behind which operators read any tensors that there are, some without a graph, some with many outputs."""
    torch.manual_seed(draw(st.integers(0, 99)))
    tensors = [torch.randn(4, requires_grad=True) for _ in range(draw(st.integers(1, 3)))] + [torch.randn(4)]
    for _ in range(draw(st.integers(1, 12))):
        a, b = (tensors[draw(st.integers(0, len(tensors) - 1))] for _ in range(2))
        kind = draw(st.sampled_from(["add", "halves", "where", "sort", "function"]))
        if kind == "halves":
            parts = torch.stack([a, b]).unbind(0)
            tensors += parts[::-1] if draw(st.booleans()) else parts
        elif kind == "function":
            tensors.append(Double.apply(a, b))
        else:
            found = {"add": a + b, "where": torch.where(a > 0, a, b), "sort": a.sort().values * b}
            tensors.append(found[kind])
    return sum(tensors)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        return 2 * a + b

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient, gradient


@given(graphs())
def test_the_walk(losses):
    found = trace(losses)
    order, children, numbers, leaves = walked(losses)
    assert found.order == order
    assert found.children == children
    assert found.numbers == numbers
    assert found.positions == {node: position for position, node in enumerate(order)}
    assert [*found.leaves] == [id(leaf) for leaf in leaves]
    assert all(a is b for a, b in zip(found.leaves.values(), leaves, strict=True))
    outputs = [tuple(tuple(output.shape) for output in node._input_metadata) for node in order]
    assert found.shapes == outputs


def test_walks_of_deep_graphs_need_no_stack():
    losses = torch.randn(3, requires_grad=True)
    for _ in itertools.repeat(None, 5_000):
        losses = losses + 1
    assert len(trace(losses).order) == 5_000
    del losses


def test_losses_without_a_graph():
    assert trace(torch.ones(3)) == Trace()
