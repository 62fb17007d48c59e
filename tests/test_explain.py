"""What the engine says it will do, before anything is trained."""

import pytest
import torch
from oracle import tensor
from torch import nn

import engm

X = tensor(2, 3, 8, 8, dtype=torch.float32)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.GroupNorm(2, 8),
        nn.Flatten(),
        nn.Linear(72, 4),
    )


@pytest.mark.parametrize("wrapped", [False, True])
def test_rows(wrapped):
    net = network()
    plan = engm.explain(engm.GradNormModule(net) if wrapped else net, X)
    assert isinstance(plan, engm.Explanation)
    assert [layer.name for layer in plan.layers] == ["0", "1", "3", "4", "6"]
    assert [layer.kind for layer in plan.layers] == ["Conv2d", "BatchNorm2d", "Conv2d", "GroupNorm", "Linear"]
    assert [layer.couples for layer in plan.layers] == [False, True, False, False, False]
    assert plan.supported
    assert plan.couples
    assert not engm.explain(net.eval(), X).couples


def test_figures():
    plan = engm.explain(network(), X)
    conv, _, strided, _, linear = plan.layers
    assert conv.direct_flops == 2 * 64 * (3 * 9) * 8
    assert strided.direct_flops == 2 * 9 * (8 * 9) * 8
    assert linear.direct_flops == 2 * 72 * 4
    for layer in plan.layers:
        assert layer.form in ("direct", "gram", "sum")
        assert layer.flops > 0
        assert layer.bytes > 0
        if layer.form != "sum":
            assert layer.flops == (layer.direct_flops if layer.form == "direct" else layer.gram_flops)
    assert plan.flops == sum(layer.flops for layer in plan.layers)


def test_forms_follow_the_shapes():
    """T = 1 is a product of norms; many positions of few features go direct; small maps of many channels go Gram."""
    linear = nn.Sequential(nn.Linear(64, 64))
    assert engm.explain(linear, torch.randn(2, 64)).layers[0].form == "gram"
    assert engm.explain(linear, torch.randn(2, 4096, 64)).layers[0].form == "direct"
    conv = nn.Sequential(nn.Conv2d(256, 256, 3, padding=1))
    assert engm.explain(conv, torch.randn(1, 256, 4, 4)).layers[0].form == "gram"
    assert engm.explain(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(1, 3, 64, 64)).layers[0].form == "direct"


def test_a_layer_called_twice_has_two_rows():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x)[:, :1])

    plan = engm.explain(Twice(), torch.randn(2, 3, 4))
    assert [layer.name for layer in plan.layers] == ["layer", "layer"]
    assert plan.layers[0].direct_flops == 3 * plan.layers[1].direct_flops


class Mixed(nn.Module):
    """A layer, parameters that enter by operators with a rule and without, and one behind a computation."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.gain, self.power, self.raw = (nn.Parameter(torch.rand(4) + 1) for _ in range(3))
        self.centres = nn.Parameter(torch.rand(4, 4))

    def forward(self, x):
        h = self.layer(x)
        return (h * self.gain).abs() ** self.power + torch.cumsum(self.raw, 0) + torch.cdist(h, self.centres, p=3.0)


def test_parameters_outside_of_layer_calls():
    plan = engm.explain(Mixed(), torch.randn(3, 4))
    assert plan.supported
    rows = {layer.name: (layer.kind, layer.rule, layer.form) for layer in plan.layers}
    assert rows["layer"][:2] == ("Linear", "LinearRule")
    assert rows["gain"] == ("Mul", "operator", "sum")
    assert rows["power"] == ("Pow", "operator, run again", "sum")
    assert rows["centres"] == ("Cdist", "operator, once an example", "sum")
    assert rows["raw"] == ("Add", "operator", "pulled back")


def test_what_mixes_the_batch_is_told_by_the_strict_check_alone():
    """Nothing is backpropagated here."""
    net = Mixed()
    plan = engm.explain(net, torch.randn(3, 4))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(layer.problem for layer in plan.layers)


def test_a_network_that_mixes_the_batch():
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            x = self.layer(x)
            return x - x.mean(0)

    plan = engm.explain(Wrong(), torch.randn(3, 4))
    assert not plan.supported
    assert "influences the losses of other examples" in str(plan)
    assert "not supported" in str(plan)


def test_prints_as_a_table():
    lines = str(engm.explain(network(), X)).splitlines()
    assert len(lines) == 1 + 2 + 5 + 2
    assert lines[0] == "forms are chosen by the cost table: built-in (cpu)"
    assert lines[1].split() == ["layer", "type", "rule", "form", "MFLOP", "kB", "rows"]
    assert "couples the batch" in lines[4]
    assert "second backward pass" in lines[-2]
    assert "one pass" in str(engm.explain(network().eval(), X)).splitlines()[-2]
    assert lines[-1] == "rows: the same for every batch of these shapes"
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("batch_norm", ["calibrated", "frozen", "exact"])
def test_tells_what_norms_mean(batch_norm):
    plan = engm.explain(engm.GradNormModule(network(), batch_norm=batch_norm), X)
    assert plan.batch_norm == batch_norm
    assert f"norms are {batch_norm}" in str(plan)


def test_inputs_may_be_tuples_and_dicts():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, a, b):
            return self.layer(input=a + b)

    a = torch.randn(2, 4)
    assert engm.explain(Two(), (a, a)).layers == engm.explain(Two(), {"a": a, "b": a}).layers


def test_user_rules_show_up(monkeypatch):
    from engm.rules import base

    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.factor

    engm.register_rule(Scale)(lambda m, a, b: {"factor": a * b})
    (layer,) = engm.explain(nn.Sequential(Scale()), torch.randn(2, 4)).layers
    assert (layer.kind, layer.problem, layer.form) == ("Scale", "", "sum")


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(fails):
    net = nn.Sequential(network(), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in net.modules()]
    rng = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError):
            engm.explain(net, X[:, :, :1])
    else:
        engm.explain(net, X)
    assert [len(module._forward_hooks) for module in net.modules()] == hooks
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(module.training for module in net.modules())


def test_wants_a_module():
    with pytest.raises(TypeError, match="Module"):
        engm.explain(lambda x: x, X)
