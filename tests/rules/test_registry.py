"""Which rule holds for which module, and rules that users bring."""

import pytest
import torch
import torch.nn.functional as F
from engine_checks import assert_measured, check
from oracle import random_losses, relative, tensor, truth
from torch import nn

import engm
from engm.rules import base

pytestmark = pytest.mark.torch_insides

X = tensor(4, 5)


class Scale(nn.Module):
    """A layer that torch does not have: a factor and a shift for every feature."""

    def __init__(self, features=5):
        super().__init__()
        self.factor = nn.Parameter(torch.rand(features) + 0.5)
        self.shift = nn.Parameter(torch.rand(features))

    def forward(self, x):
        return x * self.factor + self.shift


@pytest.fixture
def registry(monkeypatch):
    """A registry that forgets what the test registers."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


def scale_rule(module, activations, backprops):
    return {"factor": (activations * backprops).flatten(1, -2).sum(1), "shift": backprops.flatten(1, -2).sum(1)}


@pytest.mark.usefixtures("registry")
class TestUserRules:
    def test_right(self):
        assert engm.register_rule(Scale)(scale_rule) is scale_rule
        net = nn.Sequential(nn.Linear(5, 5), Scale(), nn.ReLU(inplace=True), nn.Linear(5, 5), Scale()).double()
        check(net, lambda m: random_losses(m(tensor(4, 3, 5))))

    def test_gets_detached_tensors(self):
        seen = []

        @engm.register_rule(Scale)
        def rule(module, activations, backprops):
            seen.append((activations, backprops))
            return scale_rule(module, activations, backprops)

        check(nn.Sequential(nn.Linear(5, 5), Scale()).double(), lambda m: random_losses(m(tensor(4, 3, 5))))
        assert seen
        assert all(t.grad_fn is None and not t.requires_grad and t.shape == (4, 3, 5) for pair in seen for t in pair)

    def test_subclass_that_keeps_forward_is_covered(self):
        class Mine(Scale):
            pass

        engm.register_rule(Scale)(scale_rule)
        check(nn.Sequential(Mine()).double(), lambda m: random_losses(m(tensor(4, 3, 5))))

    def test_subclass_that_overrides_forward_is_seen_in_the_graph(self):
        class Double(Scale):
            def forward(self, x):
                return super().forward(x) * 2

        engm.register_rule(Scale)(scale_rule)
        assert isinstance(base.find_rule(Double()), str)
        check(nn.Sequential(Double()).double(), lambda m: random_losses(m(tensor(4, 3, 5))))

    def test_registering_again_replaces(self):
        engm.register_rule(Scale)(lambda m, a, b: {})
        engm.register_rule(Scale)(scale_rule)
        check(nn.Sequential(Scale()).double(), lambda m: random_losses(m(tensor(4, 3, 5))))

    @pytest.mark.parametrize(
        ("returned", "shown"),
        [
            (lambda m, a, b: {"factor": b.sum(1)}, "'shift' of shape"),
            (lambda m, a, b: {"factor": b.sum((0, 1)), "shift": b.sum(1)}, r"\(4, 5\); it returned \(5,\)"),
            (lambda m, a, b: {"factor": b, "shift": b.sum(1)}, r"\(4, 5\); it returned \(4, 3, 5\)"),
            (lambda m, a, b: b.sum(1), "must return a dict"),
            (lambda m, a, b: None, "must return a dict"),
        ],
    )
    def test_wrong_shapes_are_one_clear_error(self, returned, shown):
        engm.register_rule(Scale)(returned)
        model = engm.GradNormModule(nn.Sequential(Scale()).double())
        losses = random_losses(model(tensor(4, 3, 5)))
        with pytest.raises(RuntimeError, match=f"registered for Scale.*{shown}"):
            engm.measure(model, losses)
        losses.sum().backward()  # nothing was broken
        assert model.unwrap()[0].factor.grad is not None

    def test_shared_parameter_gets_the_cross_terms(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale, self.other = Scale(), Scale()
                self.other.factor = self.scale.factor

            def forward(self, x):
                return self.other(torch.tanh(self.scale(self.scale(x))))

        engm.register_rule(Scale)(scale_rule)
        check(Twice().double(), lambda m: random_losses(m(tensor(4, 3, 5))))

    def test_sharing_with_a_layer_of_another_kind(self):
        class Projection(nn.Module):
            def __init__(self, weight):
                super().__init__()
                self.weight = weight

            def forward(self, x):
                return x @ self.weight

        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(5, 5, bias=False)
                self.back = Projection(self.fc.weight)

            def forward(self, x):
                return self.back(torch.tanh(self.fc(x)))

        @engm.register_rule(Projection)
        def rule(module, activations, backprops):
            return {"weight": torch.einsum("np,nd->npd", activations, backprops)}

        check(Tied().double(), lambda m: random_losses(m(tensor(4, 5))))

    def test_output_that_is_a_view_of_a_saved_tensor(self):
        """tanh saves its result; an in-place operation on what the layer returned must not change it unnoticed."""

        class Squash(nn.Module):
            def __init__(self):
                super().__init__()
                self.factor = nn.Parameter(torch.rand(6))

            def forward(self, x):
                return torch.tanh(x * self.factor).view(-1, 2, 3)

        @engm.register_rule(Squash)
        def rule(module, activations, backprops):
            return {"factor": backprops.flatten(1) * activations * (1 - (activations * module.factor).tanh().square())}

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc, self.squash = nn.Linear(6, 6), Squash()

            def forward(self, x):
                return self.squash(self.fc(x)).mul_(3.0)

        net = Net().double()
        model = engm.GradNormModule(net)
        fc, factor = net.fc, net.squash.factor
        x = tensor(4, 6)
        losses = random_losses(model(x))
        measured = engm.measure(model, losses)
        out = torch.tanh(F.linear(x, fc.weight, fc.bias) * factor).view(-1, 2, 3) * 3.0
        found = torch.autograd.grad(random_losses(out).sum(), [*fc.parameters(), factor])
        losses.sum().backward()
        for parameter, gradient in zip([*fc.parameters(), factor], found, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        assert measured.norms.shape == (4,)

    def test_layer_that_changes_its_input_in_place(self):
        class Shift(nn.Module):
            def __init__(self):
                super().__init__()
                self.shift = nn.Parameter(torch.rand(5))

            def forward(self, x):
                return x.add_(self.shift)

        @engm.register_rule(Shift)
        def rule(module, activations, backprops):
            return {"shift": backprops}

        check(nn.Sequential(nn.Linear(5, 5), Shift()).double(), lambda m: random_losses(m(tensor(4, 5))))

    def test_parameters_option_leaves_modules_with_others_alone(self):
        engm.register_rule(Scale, parameters=("factor",))(scale_rule)
        assert isinstance(base.find_rule(Scale()), str)
        check(nn.Sequential(Scale()).double(), lambda m: random_losses(m(tensor(4, 3, 5))))

    def test_two_outputs_are_refused(self):
        class Pair(Scale):
            def forward(self, x):
                return x * self.factor, x + self.shift

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.pair = Pair()

            def forward(self, x):
                a, b = self.pair(x)
                return a + b

        engm.register_rule(Pair)(scale_rule)
        model = engm.GradNormModule(Net())
        with pytest.raises(RuntimeError, match=r"'pair' \(Pair\) must take and return one tensor"):
            model(torch.randn(2, 5))


@pytest.mark.parametrize("wrong", [3, "Linear", nn.Linear(2, 2), int])
def test_register_rule_wants_a_module_type(wrong):
    with pytest.raises(TypeError, match="subclass of torch"):
        engm.register_rule(wrong)


def test_register_rule_wants_a_callable():
    with pytest.raises(TypeError, match="callable"):
        engm.register_rule(Scale)(None)
    assert isinstance(base.find_rule(Scale()), str)


def test_frozen_layer_without_a_rule_is_welcome():
    net = nn.Sequential(nn.Linear(5, 5), Scale(), nn.Linear(5, 5)).double()
    net[1].requires_grad_(False)
    check(net, lambda m: random_losses(m(tensor(4, 5))))


def test_layer_unfrozen_after_wrapping_counts_from_the_next_call():
    net = nn.Sequential(nn.Linear(5, 5), Scale()).double()
    net[1].requires_grad_(False)
    model = engm.GradNormModule(net)
    net[1].requires_grad_(True)
    assert_measured(engm.measure(model, random_losses(model(X))), truth(net, lambda m: random_losses(m(X))))


class LoudLinear(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


class Extra(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gate = nn.Parameter(torch.ones(1))


def replaced():
    layer = nn.Linear(5, 5)
    layer.forward = lambda x: F.linear(x, 2 * layer.weight, layer.bias)
    return layer


@pytest.mark.parametrize("make", [lambda: LoudLinear(5, 5), lambda: Extra(5, 5), replaced])
def test_layer_that_is_not_what_its_rule_knows_is_seen_in_the_graph(make):
    layer = make().double()
    assert isinstance(base.find_rule(layer), str)
    model = engm.GradNormModule(nn.Sequential(layer))
    losses = random_losses(model(X))
    assert relative(engm.measure(model, losses).norms, engm.naive_grad_norms(model, losses)) <= 1e-9


def test_lazy_layers_after_their_first_call():
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.ReLU())
    net(torch.randn(3, 5))
    check(net.double().eval(), lambda m: random_losses(m(tensor(4, 5))))


def test_the_rules_find_their_way_past_wrong_numbers():
    """The table of errors above is worth nothing if the oracle would accept anything."""
    net = nn.Sequential(nn.Linear(5, 5)).double()

    def losses(m):
        return random_losses(m(tensor(4, 5)))

    model = engm.GradNormModule(net)
    measured = engm.measure(model, losses(model))
    expected = truth(net, losses)
    expected.gradients["0.weight"][2] *= 1 + 1e-7
    with pytest.raises(AssertionError):
        assert_measured(measured, expected)
