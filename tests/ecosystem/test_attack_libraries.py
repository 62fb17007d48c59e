"""torchattacks and foolbox on a wrapped model: the plain network's adversarial examples, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training import assert_same, losses_of, sgd

import engm
from engm.capture.calls import Capture

torchattacks = pytest.importorskip("torchattacks")
foolbox = pytest.importorskip("foolbox")

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
EPS, STEP = 0.1, 0.03


def by_foolbox(attack: Any, epsilon: float | None) -> Attack:
    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return attack(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=epsilon)[1]

    return run


ATTACKS: dict[str, Attack] = {
    "torchattacks FGSM": lambda model, x, y: torchattacks.FGSM(model, EPS)(x, y),
    "torchattacks PGD": lambda model, x, y: torchattacks.PGD(model, EPS, STEP, steps=3)(x, y),
    "torchattacks CW": lambda model, x, y: torchattacks.CW(model, steps=3)(x, y),
    "torchattacks APGD": lambda model, x, y: torchattacks.APGD(model, eps=EPS, steps=3)(x, y),
    "foolbox PGD": by_foolbox(foolbox.attacks.LinfPGD(steps=3), EPS),
    "foolbox DeepFool": by_foolbox(foolbox.attacks.L2DeepFoolAttack(steps=3), None),
    "foolbox CW": by_foolbox(foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=2, steps=3), None),
}


def problem(norm: str, n: int, size: int, classes: int, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, images in [0, 1] and the labels that it gives to them."""
    torch.manual_seed(seed)
    between: nn.Module = nn.BatchNorm2d(4) if norm == "batch" else nn.GroupNorm(2, 4)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), between, nn.ReLU(), nn.Flatten(), nn.Linear(4 * size**2, classes)
    ).eval()
    x = torch.rand(n, 2, size, size)
    with torch.no_grad():
        return net, x, net(x).argmax(dim=1)


def seeded(attack: Attack, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    torch.manual_seed(0)
    return attack(model, x.clone(), y.clone())


def gradients(net: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in net.parameters()]


@contextmanager
def captures() -> Iterator[list[weakref.ref[Capture]]]:
    """Every capture that is begun. The garbage collector is off, so that reference counts alone must free them."""
    found: list[weakref.ref[Capture]] = []
    begin = Capture.__init__

    def noted(self: Capture, *args: Any) -> None:
        begin(self, *args)
        found.append(weakref.ref(self))

    gc.disable()
    try:
        with mock.patch.object(Capture, "__init__", noted):
            yield found
    finally:
        gc.enable()


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
@settings(max_examples=8)
@given(
    norm=st.sampled_from(["batch", "group"]),
    n=st.integers(1, 5),
    size=st.integers(2, 6),
    classes=st.integers(2, 7),
    seed=st.integers(0, 999),
)
def test_attack_is_that_of_the_plain_network(
    name: str, paused: bool, norm: str, n: int, size: int, classes: int, seed: int
) -> None:
    net, x, y = problem(norm, n, size, classes, seed)
    plain = copy.deepcopy(net)
    expected = seeded(ATTACKS[name], plain, x, y)
    model = engm.GradNormModule(net)
    hooks = {name: len(module._forward_hooks) for name, module in net.named_modules()}
    with captures() as begun:
        with model.paused() if paused else nullcontext():
            found = seeded(ATTACKS[name], model, x, y)
        assert_same(found, expected)
        assert (len(begun) == 0) == paused
        assert not any(ref() for ref in begun)
    assert_same(gradients(net), gradients(plain))
    assert_same(net.state_dict(), plain.state_dict())
    assert hooks == {name: len(module._forward_hooks) for name, module in net.named_modules()}


@pytest.mark.parametrize("name", ATTACKS)
def test_training_goes_on_after_an_attack_as_if_it_had_not_been(name: str) -> None:
    """torchattacks puts a model in training mode into evaluation mode and back; foolbox leaves that to the caller."""
    found = []
    for attacked in (False, True):
        net, x, y = problem("batch", 6, 5, 3, 0)
        model = engm.GradNormModule(net).train()
        opt = engm.ENGM(model, sgd(model), alpha=1.0)
        for _ in range(2):
            if attacked:
                model.train(mode=name.startswith("torchattacks"))
                seeded(ATTACKS[name], model, x, y)
                assert {module.training for module in net.modules()} == {name.startswith("torchattacks")}
                model.train()
            opt.zero_grad()
            opt.backward(losses_of(model, x, y))
            opt.step()
        found.append([net.state_dict(), opt.state_dict()])
    assert_same(found[1], found[0])
