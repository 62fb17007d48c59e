"""AutoAttack end to end on a few digits, against pyautoattack run by hand, and what its answer is checked for."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engm
from engm.adversarial import AutoAttackResult, autoattack
from engm.adversarial.autoattack import TOLERANCE

pyautoattack = pytest.importorskip("pyautoattack")
pytest.importorskip("sklearn")

Digits = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> Digits:
    from engm.recipes.data import load_digits

    split = load_digits().train
    return split.inputs[:400], split.labels[:400]


def fitted(digits: Digits, classes: int = 10) -> nn.Module:
    """A network trained for a moment, so that some examples stand up to the attacks and some do not."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, classes)
    )
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(net(digits[0]), digits[1] % classes).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net


@pytest.fixture
def net(digits: Digits) -> nn.Module:
    return fitted(digits)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyautoattack with few iterations, for us and for whoever runs it by hand."""

    class Short(pyautoattack.AutoAttack):  # type: ignore[name-defined,misc]
        def run_standard_evaluation(self, *args: Any, **options: Any) -> Any:
            for attack in (self.apgd, self.apgd_targeted, self.fab):
                attack.n_iter = attack.n_iter_orig = 6
                attack.n_restarts = 1
            self.square.n_queries = 50
            return super().run_standard_evaluation(*args, **options)

    monkeypatch.setattr(pyautoattack, "AutoAttack", Short)


def quick(net: nn.Module, x: Tensor, y: Tensor, **options: Any) -> AutoAttackResult:
    return autoattack(net, x, y, **{"eps": 0.15, "version": "custom", "attacks": ["apgd-ce"], **options})


def correct(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (net.eval()(x).argmax(dim=1) == y).double().mean().item()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("norm", "eps", "version"), [("linf", 0.1, "standard"), ("linf", 0.1, "custom"), ("l2", 0.6, "standard")]
)
def test_equals_pyautoattack_run_by_hand(net: nn.Module, digits: Digits, norm: str, eps: float, version: str) -> None:
    x, y = digits[0][:20], digits[1][:20]
    options: dict[str, Any] = {"eps": eps, "version": version, "seed": 3}
    if version == "custom":
        options["attacks"] = ["square", "fab-t", "apgd-ce"]
    found = autoattack(net, x, y, norm=norm, batch_size=12, **options)  # type: ignore[arg-type]
    adversary = pyautoattack.AutoAttack(net.eval(), norm={"linf": "Linf", "l2": "L2"}[norm], **options)
    expected, predicted = adversary.run_standard_evaluation(x, y, batch_size=12)
    assert torch.equal(found.inputs, expected)
    assert found.robust == found.reported == correct(net, expected, y) == (predicted == y).double().mean().item()
    assert 0 < found.robust < correct(net, x, y)
    assert list(found.per_attack) == ["clean", *adversary.attacks_to_run]
    figures = list(found.per_attack.values())
    assert figures[0] == correct(net, x, y)
    assert figures[-1] == found.robust
    assert figures == sorted(figures, reverse=True)


@pytest.mark.slow
def test_the_standard_version_at_full_length(net: nn.Module, digits: Digits) -> None:
    x, y = digits[0][:8], digits[1][:8]
    found = autoattack(net, x, y, eps=0.12)
    assert list(found.per_attack) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert found.robust == found.reported
    assert 0 < found.robust < 1
    assert (found.inputs - x).abs().max() <= 0.12 + TOLERANCE


@pytest.mark.usefixtures("short")
def test_one_image(net: nn.Module, digits: Digits) -> None:
    x, y = digits[0][:1], digits[1][:1]
    assert autoattack(net, x, y, eps=1e-4).robust == 1.0
    assert autoattack(net, x, y, eps=0.9).robust == 0.0
    wrong = autoattack(net, x, (y + 1) % 10, eps=0.1)
    assert wrong.per_attack == {"clean": 0.0}
    assert torch.equal(wrong.inputs, x)


@pytest.mark.usefixtures("short")
def test_everything_is_left_as_it_was(
    net: nn.Module, digits: Digits, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    x, y = digits[0][:20], digits[1][:20]
    net[1].bias.requires_grad_(False)
    net[1].weight.grad = torch.ones_like(net[1].weight)
    model = engm.GradNormModule(net.train())
    net[2].eval()
    modes = [module.training for module in net.modules()]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random, logger, tracing = torch.get_rng_state(), logging.getLogger("auto-attack"), sys.gettrace()
    before = (list(logger.handlers), logger.propagate, logger.level)

    def tracer(frame: Any, event: str, argument: Any) -> None:
        return None

    sys.settrace(tracer)
    try:
        found = quick(model, x, y, attacks=["apgd-ce", "fab", "square"])
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(tracing)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == [True, False, True, True, True, True]
    assert torch.equal(net[1].weight.grad, torch.ones_like(net[1].weight))
    assert all(p.grad is None for name, p in net.named_parameters() if name != "1.weight")
    assert torch.equal(random, torch.get_rng_state())
    assert (logger.handlers, logger.propagate, logger.level) == before
    assert capfd.readouterr() == ("", "")
    assert engm.measure(model, model(x).sum(dim=1)).norms.shape == (20,)  # no longer paused

    torch.manual_seed(99)  # whatever the global state is, the seed decides
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        again = quick(model, x, y, attacks=["apgd-ce", "fab", "square"], log_path=tmp_path / "log.txt")
    assert torch.equal(again.inputs, found.inputs)
    assert again.per_attack == found.per_attack
    assert "apgd-ce - 1/1 - " in (tmp_path / "log.txt").read_text()
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("short")
def test_modes_come_back_after_an_error(net: nn.Module, digits: Digits) -> None:
    def broken(*_: Any) -> None:
        raise ArithmeticError("as planned")

    handle = net[5].register_forward_pre_hook(broken)
    with pytest.raises(ArithmeticError, match="as planned"):
        quick(net, digits[0][:4], digits[1][:4])
    handle.remove()
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert not logging.getLogger("auto-attack").handlers


@pytest.mark.usefixtures("short")
def test_warnings_come_back(net: nn.Module, digits: Digits) -> None:
    assert quick(net, digits[0][:4], digits[1][:4]).warnings == ()
    found = quick(nn.Sequential(net, nn.Softmax(dim=1)), digits[0][:4], digits[1][:4])
    assert any("probability distribution" in warning for warning in found.warnings)


@pytest.mark.usefixtures("short")
def test_few_classes(digits: Digits) -> None:
    x, y = digits[0][:12], digits[1][:12] % 4
    found = autoattack(fitted(digits, 4), x, y, eps=0.05, norm="linf")
    assert "apgd-t" in found.per_attack
    assert found.warnings == ()
    with pytest.raises(ValueError, match="with 3 classes there is no apgd-ce/apgd-t"):
        autoattack(fitted(digits, 3), x, y % 3, eps=0.3)
    assert quick(fitted(digits, 3), x, y % 3, attacks=["apgd-ce", "fab", "square"]).robust < 1


class Shaky(nn.Module):
    """A network that gives another answer at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.randn(len(x), 10) + 0 * x.flatten(1)[:, :10]


@pytest.mark.usefixtures("short")
def test_a_recount_that_contradicts_is_refused(digits: Digits) -> None:
    with pytest.raises(RuntimeError, match=r"recounted robust accuracy is 0\.\d+ and pyautoattack reports 0\.\d+"):
        quick(Shaky(), digits[0][:30], torch.zeros(30, dtype=torch.long))


@pytest.mark.parametrize(("norm", "offset"), [("linf", 0.02), ("l2", 0.02), ("linf", float("nan"))])
def test_images_outside_of_the_ball_are_refused(
    net: nn.Module, digits: Digits, monkeypatch: pytest.MonkeyPatch, norm: str, offset: float
) -> None:
    x, y = digits[0][:4].clamp(0, 0.5), digits[1][:4]
    shift = 0.1 / (8 if norm == "l2" else 1)  # on the sphere: 64 pixels

    def run(self: Any, x: Tensor, y: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        moved = x + shift
        moved[0, 0, 3, 3] += offset
        return moved, y

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", run)
    with pytest.raises(RuntimeError, match=f"outside of the {norm} ball of radius 0.1"):
        quick(net, x, y, norm=norm, eps=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l1"}, "norm 'linf' or 'l2'"),
        ({"eps": 0.0}, "eps > 0"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"version": "fast", "attacks": None}, "knows version"),
        ({"attacks": None}, "version='custom' runs attacks"),
        ({"version": "standard"}, "the other versions take none"),
        ({"attacks": ["apgd-ce", "pgd"]}, "'pgd'"),
    ],
)
def test_bad_options(net: nn.Module, digits: Digits, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(net, digits[0][:4], digits[1][:4], **options)


def test_bad_arguments(net: nn.Module, digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = digits[0][:4], digits[1][:4]
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        quick(net, 2 * x, y)
    with pytest.raises(ValueError, match="one label per example"):
        quick(net, x, y[:3])
    for images in (x.double(), x.flatten(1)):
        with pytest.raises(ValueError, match=r"float32 images \[n, C, H, W\]"):
            quick(net, images, y)
    net[2].running_var = net[2].running_var.half()
    with pytest.raises(ValueError, match=r"'2.running_var' is torch.float16"):
        quick(net, x, y)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ModuleNotFoundError, match=r"engm\[autoattack\]"):
        quick(fitted(digits), x, y)
