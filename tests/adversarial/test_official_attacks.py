"""The attacks of TRADES, MART and FAT against their authors' code, step by step in float64."""

from __future__ import annotations

import pytest
import torch
from official_attacks import fat_linf, mart_linf, trades_l2, trades_linf
from torch import Tensor, nn

from engm.adversarial import PGD, objective

EPS, STEPS = 8 / 255, 10


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))
    return layers.double()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(12, 3, 4, 4, generator=generator, dtype=torch.float64)
    x[:4] = x[:4].round()  # black and white pixels, at which a start that is clamped differs
    return x, torch.randint(0, 5, (12,), generator=generator)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def test_trades(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    attack = objective("trades").attack(EPS, 2 / 255, STEPS, "linf")
    noise = attack.draw(x.shape, seeded(), dtype=x.dtype, device="cpu")
    assert noise.std().item() == pytest.approx(0.001, rel=0.1)
    expected = trades_linf(net.eval(), x, noise, EPS, 2 / 255, STEPS)
    torch.testing.assert_close(attack(net, x, y, generator=seeded()).inputs, expected, rtol=0, atol=1e-12)


def test_the_first_step_starts_where_the_authors_start(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    for name in ("trades", "mart"):
        attack = objective(name).attack(EPS, 2 / 255, 1, "linf")
        seen.clear()
        attack(net, x, y, generator=seeded())
        noise = attack.draw(x.shape, seeded(), dtype=x.dtype, device="cpu")
        assert torch.equal(seen[-1], x + noise), name
        assert seen[-1].min() < 0 < 1 < seen[-1].max()


def test_trades_l2_and_its_step(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    from engm.recipes.config import RunConfig

    x, y = 0.3 + 0.4 * batch[0], batch[1]  # away from the box, whose projection comes second here and first there
    config = RunConfig(objective="trades", threat="l2", eps=0.25).resolved()
    assert config.step_size == pytest.approx(0.25 / 5)
    attack = objective("trades").attack(0.25, config.step_size or 0.0, STEPS, "l2")
    noise = attack.draw(x.shape, seeded(), dtype=x.dtype, device="cpu")
    expected = trades_l2(net.eval(), x, noise, 0.25, STEPS)
    torch.testing.assert_close(attack(net, x, y, generator=seeded()).inputs, expected, rtol=0, atol=1e-6)
    assert RunConfig(objective="pgd", threat="l2", eps=0.25).resolved().step_size == pytest.approx(0.25 * 15 / 128)


def test_mart(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    attack = objective("mart").attack(EPS, 2 / 255, STEPS, "linf")
    noise = attack.draw(x.shape, seeded(), dtype=x.dtype, device="cpu")
    expected = mart_linf(net.eval(), x, y, noise, EPS, 2 / 255, STEPS)
    torch.testing.assert_close(attack(net, x, y, generator=seeded()).inputs, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [0, 1, 2])
def test_fat(net: nn.Module, batch: tuple[Tensor, Tensor], tau: int) -> None:
    x, _ = batch
    with torch.no_grad():
        y = net.eval()(x).argmax(dim=1)  # all right at first, so that they stop one after the other
    attack = objective("fat", patience=tau).attack(EPS, 0.007, STEPS, "linf")
    noise = attack.draw(x.shape, seeded(), dtype=x.dtype, device="cpu")
    assert noise.shape == (1 + STEPS, *x.shape)
    assert noise[1:].std().item() == pytest.approx(0.001, rel=0.1)
    expected = fat_linf(net, x, y, noise, EPS, 0.007, tau)
    found = attack(net, x, y, generator=seeded()).inputs
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert torch.equal(found, attack(net, x, y, noise=noise).inputs)
    part = attack(net, x[4:], y[4:], noise=noise[:, 4:]).inputs  # a process with its rows of the batch
    torch.testing.assert_close(part, found[4:], rtol=0, atol=1e-12)


def test_fat_attacks_in_evaluation_mode_unless_told_otherwise() -> None:
    from engm.recipes.config import RunConfig

    modes = {name: RunConfig(objective=name).resolved().attack_mode for name in ("pgd", "trades", "mart", "fat")}
    assert modes == {"pgd": "train", "trades": "eval", "mart": "eval", "fat": "eval"}
    assert RunConfig(objective="fat", attack_mode="train").resolved().attack_mode == "train"


def test_noise_of_steps_that_is_no_noise() -> None:
    for noise in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="step_noise"):
            PGD(EPS, 0.01, 2, step_noise=noise)
