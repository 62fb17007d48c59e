"""The attacks of TRADES, MART and FAT against their authors' code, step by step in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
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


def trades_linf(net: nn.Module, x: Tensor, noise: Tensor, step_size: float) -> Tensor:
    """trades.py of yaodongyu/TRADES, distance 'l_inf'."""
    x_adv = x.detach() + noise
    for _ in range(STEPS):
        x_adv.requires_grad_()
        loss_kl = F.kl_div(F.log_softmax(net(x_adv), dim=1), F.softmax(net(x), dim=1), reduction="sum")
        (grad,) = torch.autograd.grad(loss_kl, [x_adv])
        x_adv = x_adv.detach() + step_size * torch.sign(grad.detach())
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    return x_adv


def trades_l2(net: nn.Module, x: Tensor, noise: Tensor, eps: float) -> Tensor:
    """trades.py of yaodongyu/TRADES, distance 'l_2'."""
    delta = noise.clone().requires_grad_()
    optimizer = torch.optim.SGD([delta], lr=eps / STEPS * 2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = -F.kl_div(F.log_softmax(net(x + delta), dim=1), F.softmax(net(x), dim=1), reduction="sum")
        loss.backward()
        grad_norms = delta.grad.view(len(x), -1).norm(p=2, dim=1)  # type: ignore[union-attr]
        delta.grad.div_(grad_norms.view(-1, 1, 1, 1))  # type: ignore[union-attr]
        optimizer.step()
        delta.data.add_(x)
        delta.data.clamp_(0, 1).sub_(x)
        delta.data.renorm_(p=2, dim=0, maxnorm=eps)
    return (x + delta).detach()


def mart_linf(net: nn.Module, x: Tensor, y: Tensor, noise: Tensor, step_size: float) -> Tensor:
    """mart.py of YisenWang/MART."""
    x_adv = x.detach() + noise
    for _ in range(STEPS):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net(x_adv), y), [x_adv])
        x_adv = x_adv.detach() + step_size * torch.sign(grad.detach())
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    return x_adv


def fat_linf(net: nn.Module, x: Tensor, y: Tensor, noise: Tensor, step_size: float, tau: int) -> Tensor:
    """earlystop.py of zjfheart/Friendly-Adversarial-Training, kept in the order of the batch."""
    iter_adv, found = (x + noise[0]).clamp(0.0, 1.0), x.clone()
    control = torch.full((len(x),), tau)
    rows = torch.arange(len(x))
    for step in range(STEPS):
        iter_adv.requires_grad_()
        output = net(iter_adv)
        (grad,) = torch.autograd.grad(F.cross_entropy(output, y[rows]), [iter_adv])
        going = []
        for index, row in enumerate(rows.tolist()):
            if output[index].argmax() != y[row]:
                if control[row] == 0:
                    found[row] = iter_adv[index].detach()
                    continue
                control[row] -= 1
            going.append(index)
        if not going:
            return found
        rows = rows[going]
        eta = step_size * grad[going].sign()
        iter_adv = iter_adv.detach()[going] + eta + noise[step + 1][rows]  # omega times a normal draw
        iter_adv = torch.min(torch.max(iter_adv, x[rows] - EPS), x[rows] + EPS).clamp(0, 1)
    found[rows] = iter_adv
    return found


def test_trades(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    attack = objective("trades").attack(EPS, 2 / 255, STEPS, "linf")
    noise = attack.draw(x.shape, seeded(), dtype=x.dtype, device="cpu")
    assert noise.std().item() == pytest.approx(0.001, rel=0.1)
    expected = trades_linf(net.eval(), x, noise, 2 / 255)
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
    expected = trades_l2(net.eval(), x, noise, 0.25)
    torch.testing.assert_close(attack(net, x, y, generator=seeded()).inputs, expected, rtol=0, atol=1e-6)
    assert RunConfig(objective="pgd", threat="l2", eps=0.25).resolved().step_size == pytest.approx(0.25 * 15 / 128)


def test_mart(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    attack = objective("mart").attack(EPS, 2 / 255, STEPS, "linf")
    noise = attack.draw(x.shape, seeded(), dtype=x.dtype, device="cpu")
    expected = mart_linf(net.eval(), x, y, noise, 2 / 255)
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
    expected = fat_linf(net, x, y, noise, 0.007, tau)
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
