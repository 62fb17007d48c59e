"""Users hold the engine against the oracle on their own network; so do we, on torchvision's."""

import re

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as zoo
from engine_checks import TOLERANCE
from oracle import random_losses, relative, tensor, truth
from torch import nn

import engm

X, Y = tensor(4, 3, 32, 32), torch.tensor([1, 0, 7, 3])


def per_example(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


def small(norm=nn.BatchNorm2d):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), norm(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3600, 10)
    ).double()


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("build", "size", "n"),
    [(zoo.resnet18, 32, 3), (zoo.vgg11_bn, 32, 2), (zoo.mobilenet_v2, 32, 3), (zoo.densenet121, 32, 2)],
)
def test_networks_of_torchvision(build, size, n, training):
    torch.manual_seed(0)
    if build is zoo.vgg11_bn:
        net = build(weights=None, num_classes=10)
        net.avgpool = nn.AdaptiveAvgPool2d(1)  # 9 million parameters in place of 129
        for position, layer in {0: nn.Linear(512, 64), 3: nn.Linear(64, 64), 6: nn.Linear(64, 10)}.items():
            net.classifier[position] = layer
    else:
        net = build(weights=None, num_classes=10)
    model = engm.GradNormModule(net.double().train(training))
    report = engm.verify(model, per_example, (tensor(n, 3, size, size), Y[:n]))
    assert report.passed, str(report)
    assert report.error <= TOLERANCE["norm, float64"]
    assert report.couples is training
    assert len(report.layers) == len(list(net.parameters()))
    assert all(layer.rule != "not reached" for layer in report.layers)


# -- the report ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_norm", ["calibrated", "frozen", "exact"])
@pytest.mark.parametrize("training", [False, True])
def test_report(training, batch_norm):
    model = engm.GradNormModule(small().train(training), batch_norm=batch_norm)
    report = engm.verify(model, per_example, (X, Y), raise_on_error=True)
    assert isinstance(report, engm.VerifyReport)
    assert report.passed
    assert report.couples is training
    assert report.tolerance == 1e-9
    assert [layer.name for layer in report.layers] == ["0.weight", "1.weight", "1.bias", "4.weight", "4.bias"]
    rules = ["ConvRule", *["BatchNormRule"] * 2, *["LinearRule"] * 2]
    by_definition = training and batch_norm == "exact"
    assert [layer.rule for layer in report.layers] == (["by definition"] * 5 if by_definition else rules)
    frozen = training and batch_norm != "exact"
    assert (report.calibrated_error is not None) is frozen
    text = str(report)
    assert "passed" in text
    assert ("frozen batch statistics" in text) is (training and batch_norm != "exact")
    assert all(re.search(rf"^{re.escape(layer.name)} +{layer.rule} +\S+$", text, re.M) for layer in report.layers)


def test_calibrated_error_is_of_the_calibrated_norms():
    model = engm.GradNormModule(small(), calibrate_examples=2)
    report = engm.verify(model, per_example, (X, Y))
    exact = truth(model.unwrap(), lambda m: per_example(m(X), Y)).norms
    mapped = engm.per_example_grad_norms(model, per_example(model(X), Y))
    assert report.calibrated_error == pytest.approx(float(((mapped - exact).abs() / exact).mean()), rel=1e-6)


@pytest.fixture
def broken(monkeypatch):
    """An engine whose convolution rule forgets a part of the positions."""
    rule = type(engm.rules.find_rule(nn.Conv2d(1, 1, 1)))
    terms = rule.terms

    def wrong(self, module, activations, backprops, *rest):
        damaged = backprops.clone()
        damaged[:, :, 0] = 0
        return terms(self, module, activations, damaged, *rest)

    monkeypatch.setattr(rule, "terms", wrong)


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("training", [False, True])
def test_a_wrong_rule_is_found(training):
    model = engm.GradNormModule(small().train(training))
    report = engm.verify(model, per_example, (X, Y))
    assert not report.passed
    assert {layer.name for layer in report.layers if layer.error > report.tolerance} == {"0.weight"}
    assert "beyond tolerance" in str(report)
    assert "FAILED" in str(report)
    with pytest.raises(RuntimeError, match="does not agree"):
        engm.verify(model, per_example, (X, Y), raise_on_error=True)


@pytest.mark.usefixtures("broken")
def test_a_wrong_rule_is_found_in_a_layer_that_hardly_matters():
    class Faint(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(3072, 10)

        def forward(self, x):
            return self.head(x.flatten(1)) + 1e-4 * F.pad(self.conv(x).mean((2, 3)), (0, 6))

    report = engm.verify(engm.GradNormModule(Faint().double()), per_example, (X, Y))
    assert report.error <= 1e-6
    assert not report.passed


def test_float32_has_a_tolerance_of_its_own():
    model = engm.GradNormModule(small().float())
    report = engm.verify(model, per_example, (X.float(), Y))
    assert report.passed, str(report)
    assert 1e-9 < report.tolerance <= 1e-4


# -- what it takes ---------------------------------------------------------------------------------------------------


def test_ways_to_give_the_loss():
    model = engm.GradNormModule(small().eval())

    def of_batch(m, batch):
        return per_example(m(batch[0]), batch[1])

    def of_parts(m, x, y):
        return per_example(m(x), y)

    def of_inputs(m, x):
        return random_losses(m(x))

    class Wrapped:
        def __call__(self, outputs, targets):
            return per_example(outputs, targets)

    ways = [
        (per_example, (X, Y)),
        (nn.CrossEntropyLoss(reduction="none"), (X, Y)),
        (lambda m, batch: of_batch(m, batch), (X, Y)),
        (of_batch, [X, Y]),
        (of_parts, (X, Y)),
        (of_inputs, X),
        (Wrapped(), (X, Y)),
        (lambda m, batch: per_example(m(batch["x"]), batch["y"]), {"x": X, "y": Y}),
    ]
    for loss_fn, batch in ways:
        assert engm.verify(model, loss_fn, batch).passed


def test_error_of_the_users_own_loss_is_theirs_to_see():
    model = engm.GradNormModule(small().eval())

    def fails(m, batch):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        engm.verify(model, fails, (X, Y))


@pytest.mark.parametrize(
    ("loss_fn", "error", "match"),
    [
        (nn.CrossEntropyLoss(), ValueError, "reduction='none'"),
        (lambda m, batch: 1.0, TypeError, "float"),
        (lambda m, batch: per_example(m.unwrap()(X), Y), RuntimeError, "captured"),
        (lambda m, batch: per_example(m(X), Y) * float("nan"), ValueError, "not finite"),
        (lambda m, batch: per_example(m(X) - m(X).mean(0), Y), RuntimeError, "other examples"),
    ],
)
def test_errors_of_the_losses(loss_fn, error, match):
    with pytest.raises(error, match=match):
        engm.verify(engm.GradNormModule(small()), loss_fn, (X, Y))


def test_inputs_in_the_place_of_the_loss():
    with pytest.raises(TypeError, match=r"loss_fn must be a function .*got Tensor: engm\.verify\(model, nn\."):
        engm.verify(engm.GradNormModule(small()), X, Y)


def test_unwrapped_model():
    with pytest.raises(TypeError, match="GradNormModule"):
        engm.verify(small(), per_example, (X, Y))


# -- what it leaves alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(fails):
    net = nn.Sequential(small(), nn.Dropout(0.5)).double()
    model = engm.GradNormModule(net)
    engm.per_example_grad_norms(model, per_example(model(X), Y))
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    calibration, checked = model.calibration.state_dict(), set(model.engm_plans)
    rng, training = torch.get_rng_state(), [module.training for module in net.modules()]

    def loss(outputs, targets):
        return per_example(outputs, targets) * (float("nan") if fails else 1.0)

    if fails:
        with pytest.raises(ValueError, match="finite"):
            engm.verify(model, loss, (X, Y))
    else:
        assert engm.verify(model, loss, (X, Y)).passed
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(bool((parameter.grad == 3.0).all()) for parameter in net.parameters())
    after = model.calibration.state_dict()
    assert after["draws"] == calibration["draws"]
    assert len(after["factors"]) == len(calibration["factors"])
    for entry, expected in zip(after["factors"], calibration["factors"], strict=True):
        assert {**entry, "values": None} == {**expected, "values": None}
        assert torch.equal(entry["values"], expected["values"])
    assert set(model.engm_plans) == checked
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in net.modules()] == training


def test_under_no_grad():
    model = engm.GradNormModule(small())
    with torch.no_grad():
        assert engm.verify(model, per_example, (X, Y)).passed


def test_verify_shares_no_code_with_this_oracle():
    """The oracle of ``engm.verify`` with frozen statistics and the one of these tests agree."""
    model = engm.GradNormModule(small())
    losses = per_example(model(X), Y)
    expected = truth(model.unwrap(), lambda m: per_example(m(X), Y), frozen=True).norms
    assert relative(engm.measure(model, losses).norms, expected) <= TOLERANCE["norm, float64"]
