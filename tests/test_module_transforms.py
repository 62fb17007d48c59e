"""The wrapper under torch.func, forward-mode AD, tracing and export: the network's own answers, or one clear error."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from engine_checks import assert_measured
from oracle import random_losses, relative, tensor, truth
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap

import engm

pytestmark = pytest.mark.torch_insides

X, Y = tensor(4, 3, 5), torch.tensor([0, 1, 2, 0])


def make() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv1d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)
    return nn.Sequential(*layers).double()


def detached(net) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def mean_loss(net):
    return lambda parameters, x, y: F.cross_entropy(functional_call(net, parameters, (x,)), y)


TRANSFORMS = {
    "grad": lambda f: grad(lambda x: F.cross_entropy(f(x), Y))(X),
    "vjp": lambda f: vjp(f, X)[1](tensor(4, 3))[0],
    "jvp": lambda f: jvp(f, (X,), (tensor(4, 3, 5, seed=1),))[1],
    "jacrev": lambda f: jacrev(lambda x: f(x).sum(0))(X),
    "vmap": lambda f: vmap(f)(torch.stack([X, 2 * X])),
    "hessian": lambda f: hessian(lambda x: f(x[None]).square().sum())(X[0]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_the_inputs(transform):
    net = make()
    torch.testing.assert_close(TRANSFORMS[transform](engm.GradNormModule(net)), TRANSFORMS[transform](net))


def test_gradients_of_functional_parameters():
    net = make()
    expected = grad(mean_loss(net))(detached(net), X, Y)
    found = grad(mean_loss(engm.GradNormModule(net)))(detached(net), X, Y)
    torch.testing.assert_close(found, expected)


def test_per_example_gradients_by_vmap_are_those_that_the_engine_measures():
    model = engm.GradNormModule(make())
    one = lambda parameters, x, y: mean_loss(model)(parameters, x[None], y[None])  # noqa: E731
    gradients = vmap(grad(one), in_dims=(None, 0, 0))(detached(model), X, Y)
    expected = sum(g.flatten(1).square().sum(1) for g in gradients.values()).sqrt()
    found = engm.per_example_grad_norms(model, F.cross_entropy(model(X), Y, reduction="none"))
    assert relative(found, expected) <= 1e-12


def test_calls_under_a_transform_are_not_captured():
    model = engm.GradNormModule(make())
    expected = truth(model.unwrap(), lambda net: random_losses(net(X)))
    losses = random_losses(model(X))
    vmap(grad(lambda x: model(x[None]).sum()))(X)
    assert_measured(engm.measure(model, losses), expected)
    assert not any(module._forward_hooks for module in model.unwrap().modules())


def test_functional_call_with_the_parameters_themselves():
    model = engm.GradNormModule(make())
    expected = truth(model.unwrap(), lambda net: random_losses(net(X)))
    losses = random_losses(functional_call(model, dict(model.named_parameters()), (X,)))
    assert_measured(engm.measure(model, losses), expected)


@pytest.mark.parametrize("strict", [True, False])
def test_functional_call_with_other_parameters(strict):
    """Its norms are those of other tensors; 0, which the model's own would have, is no answer."""
    model = engm.GradNormModule(make(), strict=strict)
    others = {name: value.requires_grad_() for name, value in detached(model).items()}
    losses = random_losses(functional_call(model, others, (X,)))
    with pytest.raises(RuntimeError, match=r"other tensors than the model's.*'4\.(weight|bias)'.*functional_call"):
        engm.measure(model, losses)


def test_a_parameter_replaced_since():
    """The new parameter is not behind the losses: its gradient is 0, as in plain torch."""
    model = engm.GradNormModule(make())
    expected = truth(model.unwrap(), lambda net: random_losses(net(X)))
    losses = random_losses(model(X))
    model.unwrap()[4].weight = nn.Parameter(tensor(3, 20))
    expected.gradients["4.weight"].zero_()
    assert_measured(engm.measure(model, losses), expected)


def test_all_parameters_replaced_since_at_a_later_step():
    """The graph looks like the one before, whose plan is known."""
    model = engm.GradNormModule(make())
    opt = engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=1.0)
    opt.backward(random_losses(model(X)))
    losses = random_losses(model(X))
    for name, parameter in list(model.named_parameters()):
        module, key = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        setattr(module, key, nn.Parameter(parameter.detach().clone()))
    with pytest.raises(RuntimeError, match="they were replaced since"):
        opt.backward(losses)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_parameter_frozen_since_has_no_row():
    model = engm.GradNormModule(make())
    expected = truth(model.unwrap(), lambda net: random_losses(net(X)))
    losses = random_losses(model(X))
    model.unwrap()[4].weight.requires_grad_(False)
    del expected.gradients["4.weight"]
    assert_measured(engm.measure(model, losses), expected)


def test_ensembles():
    nets = [make(), make()]
    parameters, buffers = stack_module_state([engm.GradNormModule(net) for net in nets])
    model = engm.GradNormModule(make())
    out = vmap(lambda p, b: functional_call(model, (p, b), (X,)))(parameters, buffers)
    torch.testing.assert_close(out, torch.stack([net(X) for net in nets]))


def test_forward_mode():
    """Dual tensors go through a captured pass as they are."""
    model, tangent = engm.GradNormModule(make()), tensor(4, 3, 5, seed=1)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(X, tangent))).tangent
    torch.testing.assert_close(found, jvp(model.unwrap(), (X,), (tangent,))[1])


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_export(wrapped, strict):
    model = engm.GradNormModule(make())
    program = torch.export.export(model if wrapped else model.unwrap(), (X,), strict=strict)
    torch.testing.assert_close(program.module()(X), model.unwrap()(X))
    assert not any("engm" in str(node.target) for node in program.graph.nodes)


def test_export_for_any_batch():
    model = engm.GradNormModule(make())
    shapes = {"input": {0: torch.export.Dim("n", min=2, max=64)}}
    program = torch.export.export(model.unwrap(), (X,), dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(X[:3]), model.unwrap()(X[:3]))


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_tracing():
    model = engm.GradNormModule(make())
    traced = torch.jit.trace(model, (X,))
    torch.testing.assert_close(traced(X), model.unwrap()(X))
