"""PGD against plain loops that are written out, and what the attack must leave alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from standin import Standin
from torch import Tensor, nn
from training import seeded

import engm
from engm.adversarial import PGD, cross_entropy, evaluation_mode, kl_divergence, margin, paused
from engm.adversarial.ball import unit
from engm.adversarial.losses import log_probabilities
from engm.recipes.models.resnet import resnet18


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad(), evaluation_mode(model):
        return cross_entropy(model(x), y).sum().item()


def test_equals_a_written_out_linf_loop(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    found = PGD(0.1, 0.03, 4)(net, x, y, generator=seeded()).inputs
    net.eval()
    x_adv = (x + (2 * torch.rand(x.shape, generator=seeded()) - 1) * 0.1).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    for _ in range(4):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(x_adv), y, reduction="sum"), x_adv)
        x_adv = x_adv.detach() + 0.03 * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - 0.1), x + 0.1).clamp(0, 1)
    assert torch.equal(found, x_adv)


def test_equals_a_written_out_l2_loop(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = (batch[0].double(), batch[1])
    net.double()
    found = PGD(0.5, 0.2, 3, norm="l2", random_start=False)(net, x, y).inputs
    net.eval()
    x_adv = x
    for _ in range(3):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(x_adv), y, reduction="sum"), x_adv)
        rows = []
        for i in range(len(x)):
            delta = x_adv[i].detach() + 0.2 * gradient[i] / gradient[i].norm() - x[i]
            rows.append((x[i] + delta * min(1.0, 0.5 / delta.norm().item())).clamp(0, 1))
        x_adv = torch.stack(rows)
    torch.testing.assert_close(found, x_adv, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("until_broken", [False, True])
def test_stays_in_ball_and_box_and_climbs(
    net: nn.Module, batch: tuple[Tensor, Tensor], norm: str, loss: str, until_broken: bool
) -> None:
    x, y = batch
    eps = 0.1 if norm == "linf" else 0.5
    attack = PGD(eps, eps / 3, 5, norm=norm, loss=loss, stop_when_broken=until_broken)  # type: ignore[arg-type]
    x_adv = attack(net, x, y, generator=seeded()).inputs
    delta = (x_adv - x).flatten(1)
    lengths = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert lengths.max() <= eps * (1 + 1e-6)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not x_adv.requires_grad
    if not until_broken:
        assert loss_of(net, x_adv, y) > loss_of(net, x, y)


def test_the_generator_decides_and_the_global_state_does_not(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    attack = PGD(0.1, 0.03, 2, restarts=2)
    torch.manual_seed(5)
    first = attack(net, x, y, generator=seeded()).inputs
    torch.manual_seed(6)
    before = torch.get_rng_state()
    assert torch.equal(first, attack(net, x, y, generator=seeded()).inputs)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, attack(net, x, y, generator=seeded(8)).inputs)


def test_modes_and_gradients_are_left_as_they_were(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    net.train()
    net[1].eval()  # a frozen batch norm in a training network must stay frozen
    before = [module.training for module in net.modules()]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net[5].weight.grad = torch.ones_like(net[5].weight)
    PGD(0.1, 0.03, 3)(net, x, y)
    assert [module.training for module in net.modules()] == before
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    assert torch.equal(net[5].weight.grad, torch.ones_like(net[5].weight))
    assert all(p.grad is None for name, p in net.named_parameters() if name != "5.weight")
    assert x.grad is None
    assert not x.requires_grad


def test_modes_come_back_after_an_exception(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    def broken(logits: Tensor, labels: Tensor) -> Tensor:
        raise ArithmeticError("as planned")

    model = engm.GradNormModule(net.train())
    with pytest.raises(ArithmeticError, match="as planned"):
        PGD(0.1, 0.03, 2, loss=broken)(model, *batch)
    assert all(module.training for module in model.modules())
    losses = cross_entropy(model(batch[0]), batch[1])
    assert engm.measure(model, losses).norms.shape == (12,)  # no longer paused


def test_training_mode_on_request(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    net.train()
    PGD(0.1, 0.03, 3, eval_mode=False)(net, *batch)
    assert net[1].num_batches_tracked == 3


def test_works_under_no_grad(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        found = PGD(0.1, 0.03, 2)(net, *batch, generator=seeded()).inputs
    assert torch.equal(found, PGD(0.1, 0.03, 2)(net, *batch, generator=seeded()).inputs)


def test_measuring_changes_no_example_and_measures_the_input_of_the_last_step(
    net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    plain = PGD(0.1, 0.03, 4)(net, x, y, generator=seeded())
    model = engm.GradNormModule(net)
    measured = PGD(0.1, 0.03, 4)(model, x, y, generator=seeded(), measure=True)
    torch.testing.assert_close(measured.inputs, plain.inputs)
    assert plain.measurement is None
    assert measured.measurement is not None
    penultimate = PGD(0.1, 0.03, 3)(net, x, y, generator=seeded()).inputs
    with evaluation_mode(model):
        expected = engm.naive_grad_norms(model, cross_entropy(model(penultimate), y))
    torch.testing.assert_close(measured.measurement.norms, expected, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in net.parameters())


def test_restarts_keep_the_highest_loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    generator = seeded()
    single = PGD(0.1, 0.03, 2)
    runs = [single(net, x, y, generator=generator).inputs for _ in range(3)]
    net.eval()
    best = torch.stack([cross_entropy(net(run), y) for run in runs]).amax(0)
    found = PGD(0.1, 0.03, 2, restarts=3)(net, x, y, generator=seeded()).inputs
    torch.testing.assert_close(cross_entropy(net(found), y), best)


def test_margin() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, -1.0]], requires_grad=True)
    found = margin(logits, torch.tensor([0, 2]))
    assert found.tolist() == [-1.0, 6.0]
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-1.0, 0.0, 1.0], [0.0, 1.0, -1.0]]


def test_zero_gradient_moves_nothing() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    nn.init.zeros_(net[1].weight)
    x = torch.full((3, 1, 2, 2), 0.5)
    for norm in ("linf", "l2"):
        found = PGD(0.1, 0.05, 2, norm=norm, random_start=False)(net, x, torch.zeros(3, dtype=torch.long))  # type: ignore[arg-type]
        assert torch.equal(found.inputs, x)


def test_paused_finds_wrappers_below(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    outer = nn.Sequential(engm.GradNormModule(net))
    with paused(outer):
        losses = cross_entropy(outer(batch[0]), batch[1])
    with pytest.raises(RuntimeError, match="captured"):
        engm.measure(outer[0], losses)


@pytest.mark.parametrize(
    "settings",
    [
        {"eps": -0.1},
        {"eps": float("nan")},
        {"step_size": 0.0},
        {"steps": 0},
        {"restarts": 0},
        {"norm": "l1"},
        {"loss": "hinge"},
        {"restarts": 2, "random_start": False},
        {"loss": "kl", "random_start": False},
        {"start_noise": 0.0},
        {"start_noise": float("nan")},
        {"start_noise": 0.001, "random_start": False},
        {"patience": -1, "stop_when_broken": True},
        {"patience": 1},
        {"eps": 8},
    ],
)
def test_bad_settings(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"PGD|restarts"):
        PGD(**{"eps": 0.1, "step_size": 0.01, "steps": 2, **settings})  # type: ignore[arg-type]


def test_bad_arguments(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    attack = PGD(0.1, 0.03, 2)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        attack(net, 2 * x, y)
    with pytest.raises(ValueError, match="n >= 1"):
        attack(net, x[:0], y[:0])
    with pytest.raises(ValueError, match="floating"):
        attack(net, (255 * x).byte(), y)
    with pytest.raises(ValueError, match="one label per example"):
        attack(net, x, y[:5])
    with pytest.raises(ValueError, match="reduction='none'"):
        PGD(0.1, 0.03, 2, loss=F.cross_entropy)(net, x, y)
    with pytest.raises(ValueError, match="one run"):
        PGD(0.1, 0.03, 2, restarts=2)(engm.GradNormModule(net), x, y, measure=True)
    with pytest.raises(ValueError, match="start of one run"):
        PGD(0.1, 0.03, 2, restarts=2)(net, x, y, noise=torch.zeros_like(x))
    for noise in (torch.zeros_like(x)[:5], torch.zeros_like(x).double()):
        with pytest.raises(ValueError, match="noise like the inputs"):
            attack(net, x, y, noise=noise)
    with pytest.raises(ValueError, match="very parameters"):
        attack(net, x, y, plain=copy.deepcopy(net))


@pytest.mark.parametrize(
    ("method", "norms", "input_grads"),
    [
        (lambda m, o: engm.ENGM(m, o, 1.0), True, False),
        (lambda m, o: engm.FENGM(m, o), True, False),
        (lambda m, o: engm.NENGM(m, o, 1.0), False, True),
        (lambda m, o: engm.AENGM(m, o, 1.0, tau=2), True, True),
        (engm.MSGD, False, False),
    ],
)
def test_an_optimizer_says_what_the_last_step_measures(method, norms, input_grads):
    torch.manual_seed(0)
    model = engm.GradNormModule(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)))
    opt = method(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = torch.rand(6, 3, 2, 2), torch.randint(0, 5, (6,))
    pgd = PGD(0.1, 0.03, 3)
    found = pgd(model, x, y, generator=seeded(), measure=opt)
    torch.testing.assert_close(found.inputs, pgd(model, x, y, generator=seeded()).inputs)
    assert (found.measurement is not None) == (norms or input_grads)
    if found.measurement is not None:
        assert (found.measurement.stacked is not None) == norms
    opt.backward(cross_entropy(model(found.inputs), y), measurement=found.measurement)
    if isinstance(opt, engm.AENGM):  # between two regressions it reads input gradients only
        again = pgd(model, x, y, generator=seeded(), measure=opt)
        assert again.measurement.stacked is None
        opt.backward(cross_entropy(model(again.inputs), y), measurement=again.measurement)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("eval_mode", [False, True])
@pytest.mark.parametrize("until_broken", [False, True])
def test_borrowing_does_not_weaken_the_attack(norm, eval_mode, until_broken):
    """The adversarial examples have the bits of those that are found without a measurement."""
    torch.manual_seed(0)
    net = resnet18(width=4, norm=norm)
    model, x, y = engm.GradNormModule(net), torch.rand(6, 3, 8, 8), torch.randint(0, 10, (6,))
    with torch.no_grad():
        net.train()(x)  # running statistics that are not those of the batch
    pgd = PGD(0.1, 0.03, 4, eval_mode=eval_mode, stop_when_broken=until_broken)
    wanted = pgd(model, x, y, generator=seeded())
    found = pgd(model, x, y, generator=seeded(), measure=True)
    assert found.measurement is not None
    assert torch.equal(found.inputs, wanted.inputs)


def test_measuring_for_something_else_is_refused():
    model = engm.GradNormModule(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)))
    with pytest.raises(TypeError, match="True, False or one of engm's optimizers"):
        PGD(0.1, 0.03, 1)(
            model, torch.rand(2, 3, 2, 2), torch.zeros(2).long(), measure=torch.optim.SGD([torch.zeros(1)], 1)
        )


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """``sum p log(p / q)`` of probabilities, as the textbook has it."""
    return (p * (p / q).log()).sum(dim=1)


def test_kl_is_the_textbook_sum_and_finite_where_the_network_is_sure() -> None:
    logits = torch.randn(2, 5, 4, dtype=torch.float64)
    p, q = logits.softmax(dim=2)
    torch.testing.assert_close(kl_divergence(p.log(), log_probabilities(logits[1])), divergence(p, q))
    sure = torch.tensor([[1e4, 0.0, -1e4]])
    other = sure.flip(1).requires_grad_()
    found = kl_divergence(log_probabilities(sure), log_probabilities(other))
    assert found.item() == 2e4
    found.sum().backward()
    assert other.grad is not None
    assert other.grad.isfinite().all()
    assert log_probabilities(sure.bfloat16()).dtype == torch.float32


def test_kl_equals_a_written_out_trades_loop(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch[0].double(), batch[1]
    net.double()
    found = PGD(0.1, 0.03, 4, loss="kl", start_noise=0.001)(net, x, y, generator=seeded()).inputs
    net.eval()
    natural = net(x).softmax(dim=1).detach()
    x_adv = (x + 0.001 * torch.randn(x.shape, generator=seeded(), dtype=torch.float64)).clamp(0, 1)
    for _ in range(4):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(natural, net(x_adv).softmax(dim=1)).sum(), x_adv)
        x_adv = x_adv.detach() + 0.03 * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - 0.1), x + 0.1).clamp(0, 1)
    torch.testing.assert_close(found, x_adv, rtol=0, atol=1e-12)


def test_kl_takes_the_natural_prediction_once_and_in_the_mode_of_the_attack(
    net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    net.train()
    PGD(0.1, 0.03, 3, loss="kl", eval_mode=False, restarts=2)(net, *batch)
    assert net[1].num_batches_tracked == 1 + 2 * (3 + 1)  # steps and the comparison of the restarts
    model = engm.GradNormModule(net)
    assert PGD(0.1, 0.03, 2, loss="kl")(model, *batch, measure=True).measurement is not None


@pytest.mark.parametrize("settings", [{}, {"norm": "l2"}, {"start_noise": 0.5}, {"norm": "l2", "start_noise": 0.5}])
def test_noise_drawn_before_is_the_noise_of_a_run(
    net: nn.Module, batch: tuple[Tensor, Tensor], settings: dict[str, Any]
) -> None:
    x, y = batch
    attack = PGD(0.1, 0.03, 2, **settings)
    noise = attack.draw(x.shape, seeded(), dtype=x.dtype, device=x.device)
    found = attack(net, x, y, noise=noise).inputs
    used = seeded()
    assert torch.equal(found, attack(net, x, y, generator=used).inputs)
    drawn = seeded()
    attack.draw(x.shape, drawn, dtype=x.dtype, device=x.device)
    assert torch.equal(used.get_state(), drawn.get_state())
    part = attack(net, x[4:], y[4:], noise=noise[4:]).inputs  # a process with its rows of the batch
    torch.testing.assert_close(part, found[4:])


def test_noise_is_zero_without_a_random_start(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    attack = PGD(0.1, 0.03, 2, random_start=False)
    noise = attack.draw((12, 1, 5, 5), dtype=torch.float32, device="cpu")
    assert not noise.any()
    assert torch.equal(attack(net, *batch, noise=noise).inputs, attack(net, *batch).inputs)


@given(
    norm=st.sampled_from(["linf", "l2"]),
    loss=st.sampled_from(["ce", "kl", "margin"]),
    start_noise=st.sampled_from([None, 0.001]),
    until_broken=st.booleans(),
)
def test_a_ball_of_no_size(norm: str, loss: str, start_noise: float | None, until_broken: bool) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 3))
    x, y = torch.rand(5, 1, 3, 3), torch.randint(3, (5,))
    attack = PGD(0.1, 0.03, 3, norm=norm, loss=loss, start_noise=start_noise, stop_when_broken=until_broken)  # type: ignore[arg-type]
    assert torch.equal(replace(attack, eps=0)(net, x, y).inputs, x)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_a_stand_in_takes_the_steps_that_capture_nothing(
    net: nn.Module, batch: tuple[Tensor, Tensor], loss: str
) -> None:
    model = engm.GradNormModule(net.train())
    plain = Standin(net)
    attack = PGD(0.1, 0.03, 4, loss=loss)  # type: ignore[arg-type]
    expected = attack(model, *batch, generator=seeded(), measure=True)
    found = attack(model, *batch, generator=seeded(), measure=True, plain=plain)
    assert torch.equal(found.inputs, expected.inputs)
    assert found.measurement is not None
    assert expected.measurement is not None
    assert torch.equal(found.measurement.norms, expected.measurement.norms)
    assert plain.rows == [12] * (3 + (loss == "kl"))
    assert plain.modes == {False}
    assert plain.training
    assert all(module.training for module in net.modules())
    plain.rows.clear()
    attack(model, *batch, generator=seeded(), plain=plain)
    assert len(plain.rows) == 4 + (loss == "kl")


def test_a_compiled_stand_in(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    compiled = torch.compile(net.train(), backend="eager")
    model = engm.GradNormModule(net)
    attack = PGD(0.1, 0.03, 3)
    expected = attack(model, *batch, generator=seeded(), measure=True)
    found = attack(model, *batch, generator=seeded(), measure=True, plain=compiled)
    torch.testing.assert_close(found.inputs, expected.inputs)
    assert all(module.training for module in (net, compiled))


@pytest.mark.parametrize("size", [1e-38, 1e-27, 1e-20, 1.0, 1e25, 1e38])
def test_directions_of_very_small_and_very_large_gradients(size):
    """As of a network that is sure of itself: squares of these are 0 or infinite."""
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    found = unit(x.clamp(-2, 2) * size).double()
    wanted = x.double().clamp(-2, 2)
    wanted = wanted / wanted.flatten(1).norm(dim=1).clamp_min(1e-300).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-5 if size > 1e-30 else 1e-2, atol=1e-7)


def test_no_restart_gives_up_what_another_run_broke():
    """The cross-entropy of an example that is still right may be larger than that of one on the other side."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 16), torch.nn.ReLU(), torch.nn.Linear(16, 7))
    x, y = torch.rand(200, 3, 4, 4), torch.randint(7, (200,))
    attack = PGD(0.3, 0.1, 5, stop_when_broken=True)
    first = attack(net, x, y, generator=torch.Generator().manual_seed(1)).inputs
    all_runs = replace(attack, restarts=5)(net, x, y, generator=torch.Generator().manual_seed(1)).inputs
    broken, broken_by_all = (net(each).argmax(1) != y for each in (first, all_runs))
    assert bool(broken.any())
    assert not bool((broken & ~broken_by_all).any())
