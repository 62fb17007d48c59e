"""One test for every way that other people's code was seen to get between the wrapper and its network."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
from hostile.observers import assert_same, state_of
from hostile.right_or_refused import assert_right, assert_right_or_refused, network, optimizer
from oracle import per_example_gradients, random_losses, relative, tensor, trained
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import engm

pytestmark = pytest.mark.torch_insides

# -- the wrapper and its network --------------------------------------------------------------------------------


class Recursive(nn.Module):
    """Calls the wrapper around itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.wrapper: list[engm.GradNormModule] = []

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        x = torch.tanh(self.layer(x))
        return self.wrapper[0](x, depth=depth - 1) if depth else x


def test_a_network_that_calls_its_wrapper():
    net = Recursive().double()
    model = engm.GradNormModule(net)
    net.wrapper.append(model)
    assert_right(model, random_losses(model(tensor(4, 3))))


@pytest.mark.parametrize("inner", [lambda: nn.Linear(2, 2), lambda: nn.Sequential(nn.Linear(2, 2))])
def test_a_wrapper_inside_a_network_that_is_wrapped_already(inner):
    net = network()
    model = engm.GradNormModule(net)
    net.append(engm.GradNormModule(inner().double()))
    with pytest.raises(TypeError, match="module '3' is wrapped in a GradNormModule already"):
        model(tensor(4, 3))


def test_full_backward_hooks_on_the_wrapper_fire():
    net = network()
    model, seen = engm.GradNormModule(net), []
    before = vars(net).copy()
    model.register_full_backward_hook(lambda module, before, after: seen.append((before[0].shape, after[0].shape)))
    random_losses(model(tensor(4, 3).requires_grad_())).sum().backward()
    assert seen == [((4, 3), (4, 2))]
    assert vars(net) == before


def test_state_dict_hooks_on_the_wrapper_fire():
    model, seen = engm.GradNormModule(network()), []
    model.register_state_dict_pre_hook(lambda *_: seen.append("before saving"))
    model.register_state_dict_post_hook(lambda *_: seen.append("after saving"))
    model.register_load_state_dict_pre_hook(lambda *_: seen.append("before loading"))
    model.register_load_state_dict_post_hook(lambda *_: seen.append("after loading"))
    model.load_state_dict(model.state_dict())
    assert seen == ["before saving", "after saving", "before loading", "after loading"]


def test_forward_replaced_on_the_wrapper():
    """Mixed-precision helpers put a forward of their own around the one that was there."""
    net = network()
    model = engm.GradNormModule(net)
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)
    assert_same(model(tensor(4, 3)), 2 * net(tensor(4, 3)))
    assert_right(model, random_losses(model(tensor(4, 3))))
    del model.forward
    assert_same(model(tensor(4, 3)), net(tensor(4, 3)))


def test_compile_in_place_is_of_the_wrapper():
    net = network()
    engm.GradNormModule(net).compile(backend="eager")
    assert net._compiled_call_impl is None


class ChangesInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return self.layer(torch.relu_(x))


def test_an_input_changed_in_place_whose_gradient_is_wanted():
    net = ChangesInput().double()
    model = engm.GradNormModule(net)
    opt = engm.NENGM(model, torch.optim.SGD(net.parameters(), lr=0.1), 1.0)
    x = tensor(4, 3)
    stats = opt.backward(random_losses(model(x)), x)
    leaf = tensor(4, 3).requires_grad_()
    changed = leaf.clone()
    (gradient,) = torch.autograd.grad(random_losses(net(changed)).sum(), leaf)
    assert relative(stats.input_norms, gradient.norm(dim=1)) <= 1e-9
    assert_same(x, changed.detach())


# -- hooks ------------------------------------------------------------------------------------------------------


def test_a_measurement_inside_a_backward_pass():
    """Measuring the same graph is one clear error, and measuring another one is right."""
    model = engm.GradNormModule(network())
    losses, other = (random_losses(model(tensor(4, 3, seed=seed))) for seed in range(2))
    wanted, found = engm.measure(model, other).norms, []
    losses.register_hook(lambda gradient: found.append(engm.measure(model, other).norms))
    assert_right(model, losses)
    assert_same(found[0], wanted)
    again = random_losses(model(tensor(4, 3)))
    itself = weakref.ref(again)
    again.register_hook(lambda gradient: engm.measure(model, itself()) and None)
    with pytest.raises(RuntimeError, match="is being measured already"):
        engm.measure(model, again)


def test_a_measurement_inside_a_forward_pass():
    net = network()
    model = engm.GradNormModule(net)
    net[1].register_forward_hook(lambda module, args, out: assert_right(model, random_losses(out)))
    assert_right(model, random_losses(model(tensor(4, 3))))


def test_a_hook_that_calls_its_layer_again():
    net, entered = network(), []

    def twice(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        if entered:
            return None
        entered.append(True)
        out = out + module(torch.tanh(args[0]))
        entered.clear()
        return out

    net[0].register_forward_hook(twice)
    model = engm.GradNormModule(net)
    assert_right(model, random_losses(model(tensor(4, 3))))


def test_anomaly_mode():
    """Anomaly mode keeps notes of its own in the metadata of nodes."""
    model = engm.GradNormModule(network())
    with torch.autograd.set_detect_anomaly(True):
        assert_right(model, random_losses(model(tensor(4, 3))))


def test_hooks_for_all_modules_that_replace_outputs():
    model = engm.GradNormModule(network())
    handle = register_module_forward_hook(lambda module, args, out: 2 * out)
    try:
        assert_right_or_refused(model, random_losses(model(tensor(4, 3))))
    finally:
        handle.remove()


def test_exception_in_the_backward_pass_of_a_step():
    """Without batch norm a step is one pass, and gradients are changed at its end."""
    net = network()
    model = engm.GradNormModule(net)
    opt = optimizer(model)
    opt.backward(random_losses(model(tensor(4, 3))))

    def fail(gradient: Tensor) -> None:
        raise KeyboardInterrupt

    handle = net[0].register_forward_hook(lambda module, args, out: out.register_hook(fail) and None)
    losses = random_losses(model(tensor(4, 3)))
    handle.remove()
    before = state_of(net, opt)
    with pytest.raises(KeyboardInterrupt):
        opt.backward(losses)
    assert_same(state_of(net, opt), before)


# -- between forward and backward -------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["half", "float"])
def test_a_cast_between_forward_and_backward(cast):
    """The step is that of the graph there is, in the new dtype."""
    net = network()
    model = engm.GradNormModule(net)
    losses = random_losses(model(tensor(4, 3)))
    expected = per_example_gradients(losses, trained(net))
    getattr(model, cast)()
    stats = optimizer(model).backward(losses)
    assert relative(stats.norms, expected.norms) <= 1e-9
    wanted = expected.update((1 / expected.norms).clamp(max=1))
    for name, parameter in net.named_parameters():
        assert parameter.grad.dtype == parameter.dtype
        torch.testing.assert_close(parameter.grad, wanted[name].to(parameter.dtype))


def test_a_graph_backpropagated_twice():
    net = network()
    model = engm.GradNormModule(net)
    opt = optimizer(model)
    losses = random_losses(model(tensor(4, 3)))
    opt.backward(losses)
    before = state_of(net, opt)
    with pytest.raises(RuntimeError, match=r"second time|already backpropagated"):
        opt.backward(losses)
    assert_same(state_of(net, opt), before)


@pytest.mark.parametrize("change", ["one for another", "one more", "one less"])
def test_groups_after_a_change_of_what_is_trained(change):
    net = network(nn.Linear(2, 2))
    net[0].requires_grad_(False)
    model = engm.GradNormModule(net)
    opt = optimizer(model, groups=[["2.weight", "2.bias"], ["3.weight", "3.bias"]])
    net[0].requires_grad_(change != "one less")
    net[2].requires_grad_(change == "one more")
    with pytest.raises((RuntimeError, ValueError), match="groups"):
        opt.backward(random_losses(model(tensor(4, 3))))


# -- which loss is whose ----------------------------------------------------------------------------------------


def test_losses_in_another_order_later_on():
    net, x = network(), tensor(6, 3)
    model = engm.GradNormModule(net)
    for order in (range(6), (5, 4, 3, 2, 1, 0), (1, 0, 2, 3, 5, 4), range(6)):
        losses = random_losses(model(x))[list(order)]
        expected = per_example_gradients(losses, trained(net))
        assert relative(engm.measure(model, losses).norms, expected.norms) <= 1e-9


def test_a_batch_that_is_mixed_later_on():
    model = engm.GradNormModule(network())
    engm.measure(model, random_losses(model(tensor(6, 3))))
    out = model(tensor(6, 3))
    with pytest.raises(RuntimeError, match="influences the losses of other examples"):
        engm.measure(model, random_losses(out - out.mean(0)))


def test_a_parameter_in_the_place_of_another_leaf():
    net = network()
    model = engm.GradNormModule(net)
    leaf = tensor(2).requires_grad_()
    for term in (leaf, net[2].bias):
        assert_right_or_refused(model, random_losses(model(tensor(2, 3))) + 2 * term)


def test_two_losses_in_each_others_place():
    for one, other in itertools.combinations(range(6), 2):
        model = engm.GradNormModule(network())
        order = list(range(6))
        order[one], order[other] = other, one
        assert_right_or_refused(model, random_losses(model(tensor(6, 3)))[order])


def test_a_loss_in_the_place_of_another():
    for one, other in itertools.permutations(range(6), 2):
        model = engm.GradNormModule(network())
        order = list(range(6))
        order[one] = other
        assert_right_or_refused(model, random_losses(model(tensor(6, 3)))[order])


# -- odd batches ------------------------------------------------------------------------------------------------


def test_an_empty_batch_is_no_trouble_in_the_forward_pass():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4))
    x = torch.zeros(0, 2, 5, 5)
    assert engm.GradNormModule(net)(x).shape == net(x).shape


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.InstanceNorm1d(1, affine=True), (1, 5)),
        (nn.InstanceNorm2d(1, affine=True), (1, 4, 5)),
        (nn.InstanceNorm1d(3, affine=True), (3, 5)),
    ],
    ids=str,
)
def test_layers_called_without_a_batch(layer, shape):
    model = engm.GradNormModule(nn.Sequential(layer).double())
    assert_right_or_refused(model, (model(tensor(*shape)) ** 3).flatten(1).sum(1))


def test_a_tensor_made_in_inference_mode():
    net = network()
    net[0].weight.requires_grad_(False)
    with torch.inference_mode():
        x = tensor(4, 3)
    model = engm.GradNormModule(net)
    assert_right(model, random_losses(model(x)))


def test_numbers_stored_negated():
    model = engm.GradNormModule(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv1d(5, 2, 2)).double())
    x = torch.complex(tensor(4, 5, 3), tensor(4, 5, 3, seed=1)).conj().imag
    assert x.is_neg()
    assert_right(model, random_losses(model(x)))
