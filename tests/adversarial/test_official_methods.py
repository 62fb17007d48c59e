"""ATES, backward smoothing, LBGAT and self-adaptive training against their authors' code, restated, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from methods import METHODS
from torch import Tensor, nn
from training import network

import engm
from engm.adversarial import (
    BackwardSmoothing,
    Guide,
    LabelAverages,
    lbgat,
    objective,
    probability_gap,
    self_adaptive,
    trades,
)

EPS = 8 / 255
TOLERANCE = {"rtol": 0.0, "atol": 1e-10}


def problem(n: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 6, 6, generator=generator, dtype=torch.float64)
    x[:4] = x[:4].round()  # black and white pixels, at which a projection onto the box shows
    return x, torch.randint(5, (n,), generator=generator)


def certain(norm: str) -> nn.Module:
    """A network in evaluation mode whose probabilities differ, and are changed by the attack."""
    net = network(norm).eval()
    with torch.no_grad():
        net[-1].weight.mul_(20)
    return net


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


# -- ATES --------------------------------------------------------------------------------------------------------


def ates_linf(net: nn.Module, x: Tensor, y: Tensor, noise: Tensor, step_size: float, steps: int, gap: float) -> Tensor:
    """PGDModel.forward and _compute_mask in adv/adv_model.py of chawins/adv-exp, p 'inf', loss_func 'ce'."""
    adv = (x + noise).clamp(0, 1)
    for _ in range(steps):
        adv = adv.detach().requires_grad_()
        logits = net(adv)
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), adv)
        softmax = F.softmax(logits.detach(), dim=1)
        own = torch.gather(softmax, 1, y.unsqueeze(1)).squeeze()
        other = (softmax - 1e9 * F.one_hot(y, softmax.shape[1])).max(1)[0]
        mask = ((other - own) <= gap).to(x.dtype)
        if mask.sum() == 0:
            break
        adv = adv.detach() + step_size * mask.view(-1, 1, 1, 1) * grad.sign()
        adv = torch.min(torch.max(adv, x - EPS), x + EPS).clamp(0, 1)
    return adv.detach()


@pytest.mark.parametrize("gap", [-0.3, 0.0, 0.05, 1.0])
def test_ates_attack(gap: float) -> None:
    net, (x, _) = certain("batch"), problem()
    with torch.no_grad():
        y = net(x).argmax(dim=1)
    attack = objective("ates", gap=gap).attack(EPS, 0.01, 7, "linf")
    noise = attack.draw(x.shape, seeded(), dtype=x.dtype, device="cpu")
    expected = ates_linf(net, x, y, noise, 0.01, 7, gap)
    found = attack(net, x, y, generator=seeded()).inputs
    torch.testing.assert_close(found, expected, **TOLERANCE)
    whole = ates_linf(net, x, y, noise, 0.01, 7, 1.0)
    assert torch.equal(expected, whole) == (gap == 1.0), "every other gap stops somebody, so that it can be told"


def test_ates_measures_every_example_where_it_stopped() -> None:
    net, (x, _) = certain("group"), problem()
    y = net(x).argmax(dim=1)
    model = engm.GradNormModule(net)
    attack = objective("ates", gap=0.0).attack(EPS, 0.01, 5, "linf")
    found = attack(model, x, y, generator=seeded(), measure=True)
    torch.testing.assert_close(found.inputs, attack(net, x, y, generator=seeded()).inputs, **TOLERANCE)
    stopped = probability_gap(net(found.inputs), y) > 0
    assert 0 < stopped.sum() < len(x)
    assert found.measurement is not None
    expected = engm.naive_grad_norms(model, F.cross_entropy(model(found.inputs), y, reduction="none"))
    torch.testing.assert_close(found.measurement.norms[stopped], expected[stopped], rtol=1e-9, atol=1e-12)


def test_the_gap_is_between_probabilities() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2], [1.0, 0.0, 0.0]], dtype=torch.float64).log()
    found = probability_gap(logits, torch.tensor([0, 2, 1]))
    torch.testing.assert_close(found, torch.tensor([-0.2, 0.5, 1.0], dtype=torch.float64), **TOLERANCE)


# -- backward smoothing ------------------------------------------------------------------------------------------


def backward_smoothing(net: nn.Module, x: Tensor, vector: Tensor, step_size: float, steps: int) -> Tensor:
    """The attack of training_loss in trades_backward.py of jinghuichen/BackwardSmoothing, with gamma times a draw."""
    adv = x.detach().requires_grad_()
    natural = net(x).detach()
    near = -F.kl_div(F.log_softmax(net(adv), dim=1), F.softmax(natural + vector, dim=1), reduction="sum") / len(x)
    (grad,) = torch.autograd.grad(near, adv)
    adv = adv.detach() + step_size * grad.sign()
    adv = torch.min(torch.max(adv, x - EPS), x + EPS).clamp(0, 1)
    for _ in range(steps):
        adv.requires_grad_()
        inner = F.kl_div(F.log_softmax(net(adv), dim=1), F.softmax(natural, dim=1), reduction="sum") / len(x)
        (grad,) = torch.autograd.grad(inner, adv)
        adv = adv.detach() + step_size * grad.sign()
        adv = torch.min(torch.max(adv, x - EPS), x + EPS).clamp(0, 1)
    return adv.detach()


@pytest.mark.parametrize(("steps", "step_size"), [(1, EPS), (3, 0.01)])
@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_backward_smoothing(gamma: float, steps: int, step_size: float) -> None:
    net, (x, y) = network("batch").eval(), problem()
    chosen = objective("backward-smoothing", gamma=gamma, classes=5)
    attack = chosen.attack(EPS, step_size, steps, "linf")
    drawn = attack.draw(x.shape, seeded(), dtype=x.dtype, device="cpu")
    assert drawn.shape == (12, 5)
    assert -1 <= drawn.min() < -0.5 < 0.5 < drawn.max() <= 1
    expected = backward_smoothing(net, x, gamma * drawn, step_size, steps)
    for options in ({"generator": seeded()}, {"noise": drawn}):
        found = attack(net, x, y, **options).inputs  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, **TOLERANCE)
    part = attack(net, x[4:], y[4:], noise=drawn[4:]).inputs  # a process with its rows of the batch
    torch.testing.assert_close(part, expected[4:], **TOLERANCE)
    unaware = BackwardSmoothing(EPS, step_size, steps, gamma=gamma)  # of the number of classes
    torch.testing.assert_close(unaware(net, x, y, generator=seeded()).inputs, expected, **TOLERANCE)
    net.train()
    found = chosen.losses(net, x, expected, y).mean()
    p, log_q = F.softmax(net(x), dim=1), F.log_softmax(net(expected), dim=1)
    loss = F.cross_entropy(net(x), y) + 10.0 * F.kl_div(log_q, p, reduction="sum") / len(x)
    torch.testing.assert_close(found, loss, **TOLERANCE)


def test_backward_smoothing_starts_on_the_way_to_the_drawn_output() -> None:
    """One step to it is nearer than the natural inputs are; the l2 attack stays in its ball."""
    net, (x, y) = network("group").eval(), problem()
    for norm in ("linf", "l2"):
        attack = BackwardSmoothing(0.05, 0.01, 1, norm, classes=5)  # type: ignore[arg-type]
        drawn = attack.draw(x.shape, seeded(), dtype=x.dtype, device="cpu")
        seen: list[Tensor] = []
        hook = net.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach().clone()))
        found = attack(net, x, y, noise=drawn).inputs
        hook.remove()
        target = F.softmax(net(x) + drawn, dim=1)
        far, near = (F.kl_div(F.log_softmax(net(z), 1), target, reduction="sum") for z in (x, seen[-1]))
        assert near < far
        length = (found - x).flatten(1).norm(dim=1) if norm == "l2" else (found - x).abs().flatten(1).amax(1)
        assert length.max() <= 0.05 + 1e-9


def test_backward_smoothing_that_is_none() -> None:
    for options, message in (
        ({"loss": "ce"}, "maximises loss='kl', got 'ce': use PGD for another"),
        ({"gamma": 0.0}, "finite gamma > 0, got 0.0"),
        ({"start_noise": 0.1}, "chooses its start itself"),
        ({"step_noise": 0.1}, "chooses its start itself"),
    ):
        with pytest.raises(ValueError, match=message):
            BackwardSmoothing(EPS, EPS, 1, **options)  # type: ignore[arg-type]
    net, (x, y) = network("group").eval(), problem()
    with pytest.raises(ValueError, match="make it with classes="):
        BackwardSmoothing(EPS, EPS, 1).draw(x.shape, dtype=x.dtype, device="cpu")
    with pytest.raises(ValueError, match=r"expected noise like the inputs, .* \[12, 5\]"):
        BackwardSmoothing(EPS, EPS, 1, classes=5)(net, x, y, noise=torch.zeros_like(x))


# -- LBGAT -------------------------------------------------------------------------------------------------------


def lbgat_loss(net: nn.Module, guide: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """The loss of lbgat_loss in lbgat.py of dvlab-research/LBGAT."""
    out_adv, out_natural, out = net(x_adv), net(x), guide(x)
    loss_mse = F.mse_loss(out_adv, out) + F.cross_entropy(out, y)
    kl = F.kl_div(F.log_softmax(out_adv, dim=1), F.softmax(out_natural, dim=1), reduction="sum") / out.size(0)
    return loss_mse + beta * kl


def near(x: Tensor) -> Tensor:
    noise = torch.randn(x.shape, generator=seeded(), dtype=x.dtype)
    return (x + 0.1 * noise).clamp(0, 1)


@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_lbgat_is_the_official_loss_of_both_networks(beta: float) -> None:
    net, guide, (x, y) = network("batch"), network("batch", seed=3), problem()
    nets = [net, guide, copy.deepcopy(net), copy.deepcopy(guide)]
    found = lbgat(net, x, near(x), y, guide(x), beta=beta)
    assert found.shape == y.shape
    expected = lbgat_loss(nets[2], nets[3], x, near(x), y, beta)
    torch.testing.assert_close(found.mean(), expected, **TOLERANCE)
    both = [*net.parameters(), *guide.parameters()]
    theirs = [*nets[2].parameters(), *nets[3].parameters()]
    for ours, other in zip(torch.autograd.grad(found.mean(), both), torch.autograd.grad(expected, theirs), strict=True):
        torch.testing.assert_close(ours, other, **TOLERANCE)
    for (name, ours), other in zip(net.named_buffers(), nets[2].buffers(), strict=True):
        torch.testing.assert_close(ours, other, **TOLERANCE, msg=name)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_guide_and_network_take_the_steps_of_one_optimizer_over_both(beta: float, parts: int) -> None:
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 2e-4}
    norm = "batch" if parts == 1 else "group"
    net, guide_net = network(norm), network(norm, seed=3)
    their_net, their_guide = copy.deepcopy(net), copy.deepcopy(guide_net)
    model = engm.GradNormModule(net)
    opt = engm.MSGD(model, torch.optim.SGD(net.parameters(), **options))
    guide = Guide(guide_net, torch.optim.SGD(guide_net.parameters(), **options))
    chosen = objective("lbgat", beta=beta, beside=guide)
    theirs = torch.optim.SGD([*their_net.parameters(), *their_guide.parameters()], **options)
    for step in range(4):
        x, y = problem(seed=step)
        x_adv = near(x)
        theirs.zero_grad()
        lbgat_loss(their_net, their_guide, x, x_adv, y, beta).backward()
        theirs.step()
        for rows in torch.arange(len(x)).chunk(parts):
            given = guide.before(x[rows], y[rows], None)
            losses = chosen.losses(model, x[rows], x_adv[rows], y[rows], given)
            guide.after(given, losses, 1 / parts)
            opt.backward(losses, divisor=len(x))
        opt.step()
        opt.zero_grad()
        guide.step()
        for ours, other in zip((net, guide_net), (their_net, their_guide), strict=True):
            for name, tensor in ours.state_dict().items():
                torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_no_weight_of_an_example_reaches_the_guide(method: str) -> None:
    """And none of the guide's gradient reaches the norms: every optimizer has the same guide after a step."""
    x, y = problem(8)
    norms, guides = [], []
    for name in ("msgd", method):
        net, guide_net = network("group"), network("group", seed=3)
        model = engm.GradNormModule(net)
        opt = METHODS[name](model, torch.optim.SGD(net.parameters(), 0.1))
        guide = Guide(guide_net, torch.optim.SGD(guide_net.parameters(), 0.1))
        given = guide.before(x, y, None)
        x_adv = near(x).requires_grad_()
        losses = objective("lbgat", beside=guide).losses(model, x, x_adv, y, given)
        guide.after(given, losses, 1.0)
        norms.append(opt.backward(losses, x_adv).norms)
        guide.step()
        guides.append(torch.cat([p.detach().flatten() for p in guide_net.parameters()]))
    torch.testing.assert_close(*guides, rtol=0, atol=0)
    if method in ("engm", "fengm"):
        fixed = network("group", seed=3)(x).detach()
        expected = engm.naive_grad_norms(engm.GradNormModule(net := network("group")), lbgat(net, x, near(x), y, fixed))
        torch.testing.assert_close(norms[1], expected, rtol=1e-9, atol=1e-12)


def test_a_guide_with_another_optimizer_is_refused() -> None:
    net, other = network("group"), network("group")
    with pytest.raises(ValueError, match="must hold the trained parameters of the guide, and no"):
        Guide(net, torch.optim.SGD(other.parameters(), 0.1))
    with pytest.raises(TypeError, match=r"lbgat trains a natural network .*: pass beside=.*NoneType"):
        objective("lbgat")
    guide = Guide(net, torch.optim.SGD(net.parameters(), 0.1))
    with pytest.raises(TypeError, match=r"self-adaptive training keeps labels: pass .* got Guide"):
        objective("self-adaptive", beside=guide)
    with pytest.raises(ValueError, match="trades keeps nothing beside the network: leave beside out"):
        objective("trades", beside=guide)


# -- self-adaptive training --------------------------------------------------------------------------------------


class OfficialSelfAdaptive:
    """TRADES_SAT in losses/trades.py of LayneH/self-adaptive-training, from its start epoch on, without its attack."""

    def __init__(self, labels: Tensor, classes: int, momentum: float, beta: float) -> None:
        self.soft_labels = torch.zeros(len(labels), classes, dtype=torch.float64)
        self.soft_labels[torch.arange(len(labels)), labels] = 1
        self.momentum, self.beta = momentum, beta

    def __call__(self, net: nn.Module, x: Tensor, x_adv: Tensor, index: Tensor) -> Tensor:
        logits = net(x)
        prob = F.softmax(logits.detach(), dim=1)
        self.soft_labels[index] = self.momentum * self.soft_labels[index] + (1 - self.momentum) * prob
        weights, _ = self.soft_labels[index].max(dim=1)
        weights *= logits.shape[0] / weights.sum()
        natural = torch.sum(-F.log_softmax(logits, dim=1) * self.soft_labels[index], dim=1)
        robust = F.kl_div(F.log_softmax(net(x_adv), dim=1), F.softmax(logits, dim=1), reduction="sum") / len(x)
        return (natural * weights).mean() + self.beta * robust


@pytest.mark.parametrize(("momentum", "beta"), [(0.9, 6.0), (0.3, 1.0)])
def test_self_adaptive_training(momentum: float, beta: float) -> None:
    images, labels = problem(20)
    averages = LabelAverages(labels, 5)
    averages.values = averages.values.double()
    official = OfficialSelfAdaptive(labels, 5, momentum, beta)
    chosen = objective("self-adaptive", momentum=momentum, beta=beta, beside=averages)
    net = network("batch")
    theirs = copy.deepcopy(net)
    for step in range(5):
        rows = torch.randperm(20, generator=torch.Generator().manual_seed(step))[:8]
        x, y = images[rows], labels[rows]
        given = averages.before(x, y, rows)
        losses = chosen.losses(net, x, near(x), y, given)
        averages.after(given, losses, 1.0)
        expected = official(theirs, x, near(x), rows)
        assert losses.shape == y.shape
        torch.testing.assert_close(losses.mean(), expected, **TOLERANCE)
        torch.testing.assert_close(averages.values, official.soft_labels, **TOLERANCE)
        for loss, of in ((losses.mean(), net), (expected, theirs)):
            gradients = torch.autograd.grad(loss, list(of.parameters()))
            for parameter, gradient in zip(of.parameters(), gradients, strict=True):
                parameter.data.sub_(0.1 * gradient)
        for ours, other in zip(net.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(ours, other, **TOLERANCE)
    assert (averages.values.amax(1) < 1).float().mean() > 0.7
    assert averages.values.sum(1).allclose(torch.ones(20, dtype=torch.float64))


def test_self_adaptive_training_is_trades_at_first() -> None:
    net, (x, y) = network("group"), problem()
    found = objective("self-adaptive").losses(net, x, near(x), y)
    torch.testing.assert_close(found, trades(net, x, near(x), y), **TOLERANCE)
    sure = F.one_hot(y, 5).double()  # labels that do not move weigh all alike
    losses, labels = self_adaptive(net, x, near(x), sure, momentum=1.0)
    torch.testing.assert_close(losses, found, **TOLERANCE)
    assert torch.equal(labels, sure)


def test_labels_of_examples_that_are_told_by_no_row() -> None:
    _, y = problem()
    averages = LabelAverages(torch.zeros(3, dtype=torch.int64), 5)
    given = averages.before(torch.zeros(12, 1), y, None)
    assert torch.equal(given.before, F.one_hot(y, 5).float())
    given.after = given.before
    averages.after(given, torch.zeros(12), 1.0)
    assert torch.equal(averages.values, F.one_hot(torch.zeros(3, dtype=torch.int64), 5).float())


@pytest.mark.parametrize("make", [lambda z, y: lbgat(nn.Identity(), z, z.flip(0), y, z.flip(1)), None])
def test_saturated_logits_give_finite_losses(make: Callable[[Tensor, Tensor], Tensor] | None) -> None:
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 0.0]], dtype=torch.float16, requires_grad=True)
    y = torch.tensor([1, 0, 2])
    soft = F.one_hot(y, 3).float()
    losses = make(z, y) if make is not None else self_adaptive(nn.Identity(), z, z.flip(0), soft)[0]
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    assert not gradient.isnan().any()
