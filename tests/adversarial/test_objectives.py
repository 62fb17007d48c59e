"""Training losses against their formulas, written out one example at a time in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training import assert_close, batch, grads, network, sgd
from with_beside import losses_of_objective, with_beside

import engm
from engm.adversarial import OBJECTIVES, PGD, VANILLA, BackwardSmoothing, mart, objective, trades, vanilla

LOSSES = {"trades": trades, "mart": mart}


def probabilities(logits: Tensor) -> Tensor:
    powers = (logits - logits.max()).exp()
    return powers / powers.sum()


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return sum(p[k] * (p[k].log() - q[k].log()) for k in range(len(p)))  # type: ignore[return-value]


def trades_of_one(z: Tensor, z_adv: Tensor, y: int, beta: float) -> Tensor:
    p, q = probabilities(z), probabilities(z_adv)
    return -p[y].log() + beta * divergence(p, q)


def mart_of_one(z: Tensor, z_adv: Tensor, y: int, beta: float) -> Tensor:
    p, q = probabilities(z), probabilities(z_adv)
    runner_up = torch.stack([q[k] for k in range(len(q)) if k != y]).max()
    margin = -(1.0001 - runner_up + 1e-12).log()
    return -q[y].log() + margin + beta * (1.0000001 - p[y]) * divergence(p, q)


OF_ONE = {"trades": trades_of_one, "mart": mart_of_one}


def written_out(name: str, net: Callable[..., Tensor], x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    rows = zip(x.split(1), x_adv.split(1), y.tolist(), strict=True)
    return torch.stack([OF_ONE[name](net(a)[0], net(b)[0], k, beta) for a, b, k in rows])


def pair(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x, y = batch(n, seed, dtype)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, x + 0.3 * noise.to(dtype), y


def test_vanilla_is_cross_entropy_at_the_adversarial_input() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, x_adv, y = torch.rand(5, 1, 2, 2), torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 1, 0])
    expected = torch.stack([F.cross_entropy(net(x_adv[i : i + 1]), y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(vanilla(net, x_adv, y), expected)
    torch.testing.assert_close(VANILLA.losses(net, x, x_adv, y), expected)
    for name in ("fat", "ates"):
        torch.testing.assert_close(objective(name).losses(net, x, x_adv, y), expected)


@pytest.mark.parametrize("name", LOSSES)
@given(
    n=st.integers(1, 6),
    classes=st.integers(2, 7),
    beta=st.floats(0, 10),
    scale=st.sampled_from([0.01, 1.0, 8.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_values_and_gradients_are_those_of_the_formula(
    name: str, n: int, classes: int, beta: float, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)  # noqa: E731
    logits, logits_adv = draw().requires_grad_(), draw().requires_grad_()
    y = torch.randint(classes, (n,), generator=generator)
    cotangent = torch.rand(n, generator=generator, dtype=torch.float64)
    found = LOSSES[name](nn.Identity(), logits, logits_adv, y, beta=beta)
    expected = written_out(name, lambda z: z, logits, logits_adv, y, beta)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for got, want in zip(
        torch.autograd.grad(found, (logits, logits_adv), cotangent),
        torch.autograd.grad(expected, (logits, logits_adv), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n", [1, 5])
def test_weight_gradients_flow_through_both_passes(name: str, n: int) -> None:
    net, (x, x_adv, y) = network("group"), pair(n)
    parameters = list(net.parameters())
    found = LOSSES[name](net, x, x_adv, y)
    expected = written_out(name, net, x, x_adv, y, beta=6.0)
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found.mean(), parameters), torch.autograd.grad(expected.mean(), parameters))


def test_mart_by_hand() -> None:
    """p = (1/4, 1/4, 1/2), p' = (1/2, 1/4, 1/4), label 2: log 4 - log(1.0001 - 1/2) + 2 (1/2) (log 2 / 4)."""
    x = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
    x_adv = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    found = mart(nn.Identity(), x, x_adv, torch.tensor([2]), beta=2.0)
    assert found.item() == pytest.approx(1.3862943611 + 0.6929471972 + 0.1732868, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_saturated_logits_give_finite_losses_and_gradients(name: str, dtype: torch.dtype) -> None:
    rows = [[1e4, -1e4, -1e4], [-1e4, 1e4, -1e4], [1e4, 1e4, -1e4], [0.0, 0.0, 0.0], [-1e4, -1e4, -1e4]]
    cases = [(a, b, k) for a in rows for b in rows for k in range(3)]
    x = torch.tensor([a for a, _, _ in cases], dtype=dtype, requires_grad=True)
    x_adv = torch.tensor([b for _, b, _ in cases], dtype=dtype, requires_grad=True)
    losses = LOSSES[name](nn.Identity(), x, x_adv, torch.tensor([k for *_, k in cases]))
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    for gradient in torch.autograd.grad(losses.sum(), (x, x_adv)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_engine_takes_their_norms(name: str, norm: str) -> None:
    model = engm.GradNormModule(network(norm).train(norm == "group"))
    chosen = with_beside(name, network("group"))
    losses = lambda model, x, x_adv, y: losses_of_objective(chosen, model, x, x_adv, y)  # noqa: E731
    report = engm.verify(model, losses, pair(5), raise_on_error=True)
    assert not report.couples
    assert {layer.rule for layer in report.layers}.isdisjoint({"not reached"})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_engm_goes_through_training_mode_batch_norm(name: str) -> None:
    net = network("batch")
    x, x_adv, y = pair(7)
    chosen = with_beside(name, network("group"))
    model = engm.GradNormModule(copy.deepcopy(net))
    opt = engm.ENGM(model, sgd(model), alpha=0.5)
    stats = opt.backward(losses_of_objective(chosen, model, x, x_adv, y))
    assert (stats.weights < 1).any()
    (losses_of_objective(chosen, net, x, x_adv, y) * stats.weights).mean().backward()
    assert_close(grads(model), grads(net))


@pytest.mark.parametrize("name", LOSSES)
def test_running_statistics_see_the_natural_batch_first(name: str) -> None:
    net = network("batch")
    expected = copy.deepcopy(net)
    x, x_adv, y = pair(4)
    LOSSES[name](net, x, x_adv, y)
    expected(x), expected(x_adv)
    for (key, buffer), other in zip(net.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(buffer, other), key


@pytest.mark.parametrize("eval_mode", [True, False])
@pytest.mark.parametrize(
    ("name", "own", "borrows"),
    [
        ("pgd", {}, True),
        ("trades", {"loss": "kl", "start_noise": 0.001}, False),
        ("mart", {"start_noise": 0.001}, False),
        ("fat", {"stop_when_broken": True, "patience": 2, "step_noise": 0.001}, True),
        ("ates", {"stop_when_broken": True, "stop_gap": 0.3}, True),
        ("lbgat", {"loss": "kl", "start_noise": 0.001}, False),
        ("self-adaptive", {"loss": "kl", "start_noise": 0.001}, False),
    ],
)
def test_every_method_has_its_own_attack(name: str, own: dict[str, object], borrows: bool, eval_mode: bool) -> None:
    chosen = with_beside(name, network("group"), patience=2, gap=0.3, eval_mode=eval_mode)
    assert (chosen.name, chosen.attack_maximises_it) == (name, borrows)
    expected = PGD(0.5, 0.1, 7, "l2", eval_mode=eval_mode, **own)  # type: ignore[arg-type]
    assert chosen.attack(0.5, 0.1, 7, "l2") == expected


def test_backward_smoothing_has_an_attack_of_its_own() -> None:
    chosen = objective("backward-smoothing", gamma=0.5, classes=5, eval_mode=False)
    assert not chosen.attack_maximises_it
    expected = BackwardSmoothing(0.5, 0.1, 7, "l2", eval_mode=False, gamma=0.5, classes=5)
    assert chosen.attack(0.5, 0.1, 7, "l2") == expected


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_attack_raises_what_it_climbs(name: str) -> None:
    net = network("batch", dtype=torch.float32).eval()
    x, _, y = pair(9, dtype=torch.float32)
    x = x.sigmoid()
    options = {"beta": 100.0} if name == "lbgat" else {}  # it climbs the KL term, which is not all of the loss
    chosen = with_beside(name, network("group", dtype=torch.float32), **options)
    attack = chosen.attack(0.1, 0.02, 5, "linf")
    found = attack(net, x, y, generator=torch.Generator().manual_seed(0)).inputs
    assert (found - x).abs().max() <= 0.1 + 1e-6
    before, after = (losses_of_objective(chosen, net, x, other, y).mean() for other in (x, found))
    assert after > before


def test_objectives_are_found_by_name() -> None:
    assert [with_beside(name, network("group")).name for name in OBJECTIVES] == list(OBJECTIVES)
    assert objective("vanilla").name == VANILLA.name == "pgd"
    assert VANILLA.attack_maximises_it
    x, x_adv, y = pair(3)
    for name, loss in LOSSES.items():
        twice = pickle.loads(pickle.dumps(objective(name, beta=2.0)))  # as worker processes get it
        net = network("group")
        assert_close(twice.losses(net, x, x_adv, y), loss(net, x, x_adv, y, beta=2.0))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"unknown objective: 'Trade'; did you mean trades\? \(known: pgd, trades, "):
        objective("Trade")
    with pytest.raises(ValueError, match=r"unknown objective: 'zzz' \(known"):
        objective("zzz")
    for beta in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="beta must be a finite number >= 0"):
            objective("trades", beta=beta)
    with pytest.raises(ValueError, match="patience must be a number of steps >= 0, got -1"):
        objective("fat", patience=-1)
    for gap in (-1.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"gap must lie in \[-1, 1\], between two probabilities, got"):
            objective("ates", gap=gap)
    for gamma in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="gamma must be a finite number > 0"):
            objective("backward-smoothing", gamma=gamma)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), got 1.0"):
        objective("self-adaptive", momentum=1.0)
