"""The definition itself: one backpropagation an example, against plain torch."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from oracle import per_example_gradients, random_losses, relative, tensor, trained, truth
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import engm
from engm.exact import exact_squared_norms

pytestmark = pytest.mark.torch_insides

X = tensor(5, 3, 6, 6)


def network(norm=nn.BatchNorm2d, width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), norm(width), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16 * width, 3)
    ).double()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_naive_norms_are_through_the_statistics(wrapped, training):
    net = network().train(training)
    model = engm.GradNormModule(net) if wrapped else net
    expected = truth(net, lambda m: random_losses(m(X)))
    losses = random_losses(model(X))
    assert relative(engm.naive_grad_norms(model, losses), expected.norms) <= 1e-9
    losses.sum().backward()


@pytest.mark.parametrize("examples", [None, [3], [4, 0, 2], []])
def test_rows_and_examples(examples):
    net = network()
    parameters = trained(net)
    losses = random_losses(net(X))
    found = exact_squared_norms(losses, list(parameters.values()), examples)
    expected = torch.stack(list(per_example_gradients(losses, parameters).squared_norms.values()))
    assert found.shape == (len(parameters), 5 if examples is None else len(examples))
    torch.testing.assert_close(found, expected if examples is None else expected[:, examples])


def test_parameters_that_are_not_reached_have_norm_zero():
    net = network()
    stranger = nn.Parameter(torch.ones(3, dtype=torch.float64))
    losses = random_losses(net(X))
    found = exact_squared_norms(losses, [stranger, *net.parameters()])
    assert bool((found[0] == 0).all())
    assert bool((found[1] > 0).all())
    assert exact_squared_norms(losses, []).shape == (0, 5)


class Counts(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket] += 1
        return function(*args, **(kwargs or {}))


def test_an_example_costs_one_backpropagation():
    """Batch norm's backward pass in particular is torch's own, which vmap would take apart."""
    losses, parameters = random_losses((net := network())(X)), list(net.parameters())
    with Counts() as once:
        torch.autograd.grad(losses[0], parameters, retain_graph=True)
    with Counts() as all_of_them:
        exact_squared_norms(losses, parameters)
    assert any("norm_backward" in str(operator) for operator in once.calls)
    for operator, calls in once.calls.items():
        if "backward" in str(operator):
            assert all_of_them.calls[operator] == 5 * calls


def test_backward_functions_that_look_at_values():
    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (2 if gradient.sum().item() < 1e9 else 0)

    net = nn.Linear(4, 3).double()
    losses = Looks.apply(random_losses(net(tensor(5, 4))))
    expected = per_example_gradients(losses, trained(net)).norms
    assert relative(engm.naive_grad_norms(net, losses), expected) <= 1e-12


def test_complex_gradients_have_imaginary_parts():
    net = nn.Linear(4, 3, dtype=torch.cdouble)
    losses = random_losses(net(tensor(5, 4).cdouble()).abs())
    assert relative(engm.naive_grad_norms(net, losses), per_example_gradients(losses, trained(net)).norms) <= 1e-12


def test_a_graph_that_is_gone_is_torchs_own_error():
    net = network()
    losses = random_losses(net(X))
    losses.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        engm.naive_grad_norms(net, losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulates_in_float32(dtype):
    net = network().to(dtype).eval()
    losses = F.cross_entropy(net(X.to(dtype)), torch.zeros(5, dtype=int), reduction="none")
    assert engm.naive_grad_norms(net, losses).dtype == torch.float32


@pytest.mark.parametrize(
    ("losses", "error", "match"),
    [
        (lambda m: random_losses(m(X)).mean(), ValueError, "reduction='none'"),
        (lambda m: random_losses(m(X))[:0], ValueError, "no example"),
        (lambda m: random_losses(m(X)).detach(), ValueError, "no graph"),
        (lambda m: 3.0, TypeError, "float"),
    ],
)
def test_errors(losses, error, match):
    net = network()
    with pytest.raises(error, match=match):
        engm.naive_grad_norms(net, losses(net))


def test_gradients_are_untouched():
    net = network()
    engm.naive_grad_norms(net, random_losses(net(X)))
    assert all(parameter.grad is None for parameter in net.parameters())
