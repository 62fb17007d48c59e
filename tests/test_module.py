"""The wrapper: everything that torch or a user asks of a network passes through to it, and nothing sticks to it."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import per_example_gradients, trained
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from training import assert_close, assert_same, batch, losses_of, network, sgd

import engm
from engm.rules import base

pytestmark = pytest.mark.torch_insides


class Net(nn.Module):
    """A network with a method, attributes, buffers of both kinds and a submodule of its own."""

    def __init__(self):
        super().__init__()
        self.body = network("batch")[:6]
        self.fc = nn.Linear(24, 5)
        self.register_buffer("centre", torch.full((3, 1, 1), 0.5))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.temperature = 1.0
        self.double()

    def features(self, x):
        return self.body(x - self.centre).flatten(1)

    def forward(self, x, *, temperature=None):
        return self.fc(self.features(x)) / (temperature or self.temperature)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def model(net):
    return engm.GradNormModule(net)


def hooks_of(net):
    return [len(d) for m in net.modules() for key, d in sorted(vars(m).items()) if key.endswith("_hooks")]


class TestParametersAndState:
    def test_names_and_identity(self, net, model):
        assert [(k, id(v)) for k, v in model.named_parameters()] == [(k, id(v)) for k, v in net.named_parameters()]
        assert [(k, id(v)) for k, v in model.named_buffers()] == [(k, id(v)) for k, v in net.named_buffers()]
        assert list(model.named_modules())[1:] == list(net.named_modules())[1:]
        assert list(model.children()) == list(net.children())
        assert model.get_submodule("body.0") is net.body[0]
        assert model.get_parameter("fc.bias") is net.fc.bias
        assert_same(nn.utils.parameters_to_vector(model.parameters()), nn.utils.parameters_to_vector(net.parameters()))

    def test_state_dict_has_the_networks_own_keys(self, net, model):
        assert_same(dict(model.state_dict()), dict(net.state_dict()))
        assert next(iter(model.state_dict(prefix="a."))) == "a." + next(iter(net.state_dict()))
        assert "cache" not in model.state_dict()

    def test_load_state_dict(self, net, model):
        other = Net()
        result = model.load_state_dict(other.state_dict())
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        assert_same(dict(net.state_dict()), dict(other.state_dict()))
        state = dict(other.state_dict())
        del state["fc.bias"]
        with pytest.raises(RuntimeError, match=r"Missing key.*fc.bias"):
            model.load_state_dict(state)
        assert model.load_state_dict(state, strict=False).missing_keys == ["fc.bias"]
        weight = net.fc.weight
        assert model.load_state_dict(other.state_dict(), assign=True).missing_keys == []
        assert net.fc.weight is not weight
        assert dict(model.named_parameters())["fc.weight"] is net.fc.weight

    def test_as_a_part_of_something_larger(self, net):
        class Old(Net):
            """Loads states of a former version, in which fc was called head."""

            def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
                for key in [k for k in state_dict if k.startswith(prefix + "head")]:
                    state_dict[key.replace("head", "fc")] = state_dict.pop(key)
                super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

        old = Old()
        whole = nn.Sequential(nn.Identity(), engm.GradNormModule(old))
        state = {f"1.{key.replace('fc', 'head')}": value for key, value in net.state_dict().items()}
        assert list(whole.state_dict()) == [f"1.{key}" for key in net.state_dict()]
        whole.load_state_dict(state)
        assert_same(dict(old.state_dict()), dict(net.state_dict()))

    def test_moves_and_casts(self, net, model):
        assert model.float() is model
        assert {p.dtype for p in net.parameters()} == {torch.float32}
        assert net.centre.dtype == torch.float32
        assert model.to(torch.float64) is model
        assert net.fc.weight.dtype == torch.float64
        model.to("meta")
        assert next(model.parameters()).is_meta
        model.to_empty(device="cpu")
        assert not next(net.parameters()).is_meta

    def test_requires_grad(self, net, model):
        model.requires_grad_(False)
        assert not any(p.requires_grad for p in net.parameters())
        assert model.trainable_parameters() == []
        model.requires_grad_(True)
        model.body.requires_grad_(False)
        assert [name for name, _ in model.trainable_parameters()] == ["fc.weight", "fc.bias"]

    def test_zero_grad(self, net, model):
        model(torch.randn(4, 3, 6, 6).double()).sum().backward()
        assert net.fc.weight.grad is not None
        model.zero_grad()
        assert net.fc.weight.grad is None

    def test_registering_on_the_wrapper_registers_on_the_network(self, net, model):
        model.register_buffer("extra", torch.ones(1), persistent=False)
        model.register_parameter("gain", nn.Parameter(torch.ones(1)))
        model.add_module("more", nn.ReLU())
        assert net.extra is model.extra
        assert isinstance(net.more, nn.ReLU)
        assert "gain" in net.state_dict()
        assert "extra" not in net.state_dict()


class TestAttributes:
    def test_pass_through_both_ways(self, net, model):
        assert model.temperature == 1.0
        model.temperature = 2.0
        assert net.temperature == 2.0
        model.note = "new"
        assert net.note == "new"
        del model.note
        assert not hasattr(net, "note")
        assert not hasattr(model, "nonsense")
        with pytest.raises(AttributeError, match="nonsense"):
            _ = model.nonsense

    def test_methods_are_the_networks(self, net, model):
        x, _ = batch(4)
        model.eval()
        assert_same(model.features(x).detach(), net.features(x).detach())

    def test_keyword_arguments_of_forward(self, net, model):
        x, _ = batch(4)
        model.eval()
        assert_same(model(x, temperature=3.0).detach(), net(x, temperature=3.0).detach())

    def test_a_new_submodule_takes_effect(self, net, model):
        model.fc = nn.Linear(24, 3).double()
        assert net.fc is model.fc
        assert "fc.weight" in dict(model.named_parameters())
        x, y = batch(6)
        model.eval()
        losses = F.cross_entropy(model(x), y % 3, reduction="none")
        assert_close(engm.per_example_grad_norms(model, losses), per_example_gradients(losses, trained(model)).norms)

    def test_a_new_submodule_without_a_rule_takes_effect_too(self, model):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight, self.gain = nn.Parameter(torch.randn(3, 24)), nn.Parameter(torch.randn(3))

            def forward(self, x):
                return x @ self.weight.T * self.gain

        model.fc = Scaled().double()
        x, y = batch(6)
        model.eval()
        losses = F.cross_entropy(model(x), y % 3, reduction="none")
        assert_close(engm.per_example_grad_norms(model, losses), per_example_gradients(losses, trained(model)).norms)

    def test_mode(self, net, model):
        assert model.training
        assert model.eval() is model
        assert not any(m.training for m in net.modules())
        assert not model.training
        assert model.train() is model
        assert all(m.training for m in net.modules())
        net.eval()
        assert not model.training
        model.train()
        model.body.eval()
        assert model.training

    def test_apply_reaches_every_module_of_the_network(self):
        def fill(module):
            if isinstance(module, nn.Linear):
                nn.init.constant_(module.weight, 0.25)

        for net in (nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)):
            model = engm.GradNormModule(net)
            assert model.apply(fill) is model
            assert all((p == 0.25).all() for name, p in net.named_parameters() if "weight" in name)

    def test_repr_shows_the_network(self, model):
        assert "GradNormModule(batch_norm='calibrated'" in repr(model)
        assert "(fc): Linear(in_features=24, out_features=5" in repr(model)

    def test_hooks_on_wrapper_and_network_fire(self, net, model):
        seen = []
        model.register_forward_hook(lambda *_: seen.append("wrapper"))
        net.register_forward_hook(lambda *_: seen.append("network"))
        net.fc.register_forward_pre_hook(lambda *_: seen.append("layer"))
        model(batch(2)[0])
        assert seen == ["layer", "network", "wrapper"]

    def test_a_hook_that_changes_an_output_is_seen(self, net, model):
        net.body[2].register_forward_hook(lambda module, args, output: output * 2)
        model.eval()
        losses = losses_of(model, *batch(5))
        assert_close(engm.per_example_grad_norms(model, losses), per_example_gradients(losses, trained(model)).norms)


class TestCopies:
    @pytest.mark.parametrize(
        "copied",
        [
            copy.deepcopy,
            lambda model: pickle.loads(pickle.dumps(model)),
            lambda model: torch.load(saved(model), weights_only=False),
        ],
        ids=["deepcopy", "pickle", "torch.save"],
    )
    def test_are_whole_and_apart(self, net, model, copied):
        x, y = batch(6)
        engm.per_example_grad_norms(model, losses_of(model, x, y))
        twin = copied(model)
        assert isinstance(twin, engm.GradNormModule)
        assert_same(dict(twin.state_dict()), dict(model.state_dict()))
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in net.parameters()}
        assert [id(p) for p in twin.parameters()] == [id(p) for p in twin.unwrap().parameters()]
        twin.fc = nn.Linear(24, 5).double()
        assert twin.unwrap().fc is twin.fc
        assert net.fc is not twin.fc
        with torch.no_grad():
            twin.body[0].weight.zero_()
        assert model.body[0].weight.any()
        assert twin.calibration is not model.calibration
        assert_same(twin.calibration.state_dict(), model.calibration.state_dict())
        losses = losses_of(twin, x, y)
        assert engm.per_example_grad_norms(twin, losses).shape == (6,)

    def test_average_of_weights(self, net, model):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=False)
        opt = engm.ENGM(model, sgd(model), 0.5)
        x, y = batch(8)
        expected = []
        for step in range(2):
            opt.backward(losses_of(model, x, y))
            opt.step()
            opt.zero_grad()
            average.update_parameters(model)
            now = [p.detach().clone() for p in net.parameters()]
            expected = now if step == 0 else [old + (new - old) / 2 for old, new in zip(expected, now, strict=True)]
        assert_close([p.detach() for p in average.module.parameters()], expected)
        update_bn([x], average)
        average.eval()
        assert average(x).shape == (8, 5)
        assert list(average.module.state_dict()) == list(net.state_dict())


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


class TestWrapping:
    def test_nothing_is_left_on_the_network(self, net):
        hooks, attributes = hooks_of(net), {name: set(vars(m)) for name, m in net.named_modules()}
        forward = net.forward
        model = engm.GradNormModule(net)
        opt = engm.ENGM(model, sgd(model), 0.5)
        opt.backward(losses_of(model, *batch(4)))
        assert model.unwrap() is net
        assert hooks_of(net) == hooks
        assert {name: set(vars(m)) for name, m in net.named_modules()} == attributes
        assert net.forward == forward
        assert type(net) is Net

    def test_nothing_is_left_after_a_forward_pass_that_fails(self, net, model):
        hooks = hooks_of(net)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.zeros(2, 3, 6, 7, dtype=torch.float64))
        assert hooks_of(net) == hooks
        assert engm.per_example_grad_norms(model, losses_of(model, *batch(4))).shape == (4,)

    def test_unwrapped_and_wrapped_again(self, net, model):
        x, y = batch(6)
        model.eval()
        first = engm.per_example_grad_norms(model, losses_of(model, x, y))
        again = engm.GradNormModule(model.unwrap())
        assert_same(engm.per_example_grad_norms(again, losses_of(again, x, y)), first)

    def test_refuses_what_it_cannot_wrap(self, net, model):
        with pytest.raises(TypeError, match="wrapped in a GradNormModule already"):
            engm.GradNormModule(model)
        with pytest.raises(TypeError, match=r"GradNormModule wraps a torch.nn.Module, got function"):
            engm.GradNormModule(lambda x: x)
        with pytest.raises(TypeError, match="module '1' is wrapped in a GradNormModule already"):
            engm.GradNormModule(nn.Sequential(nn.Identity(), model))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_norm": "none"}, "batch_norm must be one of .*calibrated.*got 'none'"),
            ({"calibrate_every": 0}, "calibrate_every must be a positive integer, got 0"),
            ({"calibrate_examples": 1.5}, "calibrate_examples must be a positive integer, got 1.5"),
            ({"views": -1}, "views must be a positive integer"),
        ],
    )
    def test_refuses_options(self, net, options, message):
        with pytest.raises(ValueError, match=message):
            engm.GradNormModule(net, **options)

    def test_only_its_own_calls_capture(self, net, model):
        x, y = batch(4)
        with pytest.raises(RuntimeError, match="captured forward pass"):
            engm.per_example_grad_norms(model, losses_of(net, x, y))
        with model.paused(), model.paused():
            paused = losses_of(model, x, y)
        with pytest.raises(RuntimeError, match="captured forward pass"):
            engm.per_example_grad_norms(model, paused)
        assert engm.per_example_grad_norms(model, losses_of(model, x, y)).shape == (4,)

    def test_pause_ends_with_an_exception_too(self, model):
        with pytest.raises(KeyError), model.paused():
            raise KeyError
        assert engm.per_example_grad_norms(model, losses_of(model, *batch(4))).shape == (4,)

    def test_no_grad_and_inference_are_plain_calls(self, net, model):
        x, _ = batch(4)
        model.eval()
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                assert not model(x).requires_grad
                assert torch.equal(model(x), net(x))

    def test_inside_a_larger_module(self, net):
        class Normalized(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return self.inner(x / 2)

        model = engm.GradNormModule(net)
        outer = Normalized(model).eval()
        x, y = batch(5)
        losses = losses_of(outer, x, y)
        assert_close(engm.per_example_grad_norms(model, losses), per_example_gradients(losses, trained(outer)).norms)

    @pytest.mark.parametrize("name", ["batch_norm", "views", "strict", "calibration"])
    def test_a_layer_may_bear_the_name_of_an_option(self, name):
        """The wrapper's own attribute is what is read; the network's is reached by ``unwrap``, and setting it works."""
        net = nn.Sequential(nn.Flatten(), nn.Linear(108, 5)).double()
        model = engm.GradNormModule(net)
        option = getattr(model, name)
        setattr(model, name, nn.Linear(5, 5).double())
        assert getattr(model, name) is option
        assert isinstance(getattr(model.unwrap(), name), nn.Linear)
        assert f"{name}.weight" in dict(model.named_parameters())
        losses = losses_of(model, *batch(4))
        assert_close(engm.per_example_grad_norms(model, losses), per_example_gradients(losses, trained(model)).norms)


CHANGES_OF_A_NETWORK = {
    "frozen": lambda net: net.fc.weight.requires_grad_(False),
    "replaced parameter": lambda net: setattr(net.fc, "weight", nn.Parameter(net.fc.weight.detach().clone())),
    "replaced module": lambda net: setattr(net, "fc", nn.Linear(24, 5).double()),
    "removed": lambda net: net.fc.register_parameter("bias", None),
    "replaced forward": lambda net: setattr(net.fc, "forward", lambda x: 2 * F.linear(x, net.fc.weight, net.fc.bias)),
    "cast": lambda net: net.float(),
    "mode": lambda net: net.eval(),
}


class TestWalks:
    """What is remembered of a network is forgotten as soon as it is another."""

    @pytest.mark.parametrize("change", CHANGES_OF_A_NETWORK)
    def test_changes_count(self, net, change):
        model = engm.GradNormModule(net, batch_norm="frozen")
        x, y = batch(6)
        engm.per_example_grad_norms(model, losses_of(model, x, y))
        CHANGES_OF_A_NETWORK[change](net)
        x = x.to(net.fc.weight.dtype)
        got = engm.per_example_grad_norms(model, losses_of(model, x, y))
        fresh = engm.GradNormModule(net, batch_norm="frozen")
        want = engm.per_example_grad_norms(fresh, losses_of(fresh, x, y))
        torch.testing.assert_close(got, want)
        assert [name for name, _ in model.trainable_parameters()] == [name for name, _ in fresh.trainable_parameters()]
        assert all(
            a is b for (_, a), (_, b) in zip(model.trainable_parameters(), fresh.trainable_parameters(), strict=True)
        )

    def test_rules_that_are_registered_later_count(self, model, net, monkeypatch):
        monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
        x, y = batch(6)
        first = engm.per_example_grad_norms(model, losses_of(model, x, y))

        @engm.register_rule(nn.Linear)
        def zero(module, activations, backprops):
            return {name: torch.zeros(len(backprops), *p.shape).double() for name, p in module.named_parameters()}

        model.strict = False
        assert not torch.equal(engm.per_example_grad_norms(model, losses_of(model, x, y)), first)


@pytest.mark.parametrize(
    ("name", "value"), [("batch_norm", "Exact"), ("coupled", "no"), ("check_every", 0), ("check_every", 2.5)]
)
def test_an_option_that_is_out_of_range_is_refused_when_it_is_set_too(net, name, value):
    model = engm.GradNormModule(net)
    before = getattr(model, name)
    with pytest.raises(ValueError, match=f"{name} must be"):
        setattr(model, name, value)
    assert getattr(model, name) == before
    with pytest.raises(ValueError, match=f"{name} must be"):
        engm.GradNormModule(net, **{name: value})


class TestNames:
    """What the wrapper and the network have under one name."""

    def test_names_of_the_network_are_the_networks(self, net):
        """Whatever the engine keeps for itself; and an option that nothing reads."""
        for name in ("views", "observer", "watch", "plans", "skeletons"):
            setattr(net, name, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = engm.GradNormModule(net, batch_norm="exact")
        for name in ("views", "observer", "watch", "plans", "skeletons"):
            assert getattr(model, name) == 3
            setattr(model, name, 5)
            assert getattr(net, name) == 5
        losses = losses_of(model, *batch(4))
        assert_close(engm.per_example_grad_norms(model, losses), per_example_gradients(losses, trained(model)).norms)

    @pytest.mark.parametrize("name", ["batch_norm", "strict", "coupled", "check_every", "calibration", "paused"])
    def test_an_option_that_the_network_has_an_attribute_of_is_told(self, net, name):
        setattr(net, name, 3)
        with pytest.warns(UserWarning, match=rf"model\.unwrap\(\)\.{name} for the network's"):
            model = engm.GradNormModule(net)
        assert getattr(model, name) != 3
        assert getattr(model.unwrap(), name) == 3

    def test_a_layer_of_the_name_of_an_option_is_told(self, net):
        net.batch_norm = nn.Identity()
        with pytest.warns(UserWarning, match="batch_norm"):
            assert engm.GradNormModule(net).batch_norm == "calibrated"

    def test_views_can_be_read_and_set(self, net):
        model = engm.GradNormModule(net, views=2)
        assert model.views == 2
        model.views = 3
        assert model.views == 3
        assert not hasattr(net, "views")
