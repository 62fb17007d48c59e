"""Attacks that leave examples alone once they are broken, against Algorithm 1 of FAT an example at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from standin import Standin
from torch import Tensor, nn
from training import seeded

import engm
from engm.adversarial import PGD, cross_entropy, margin


def test_stopping_leaves_broken_examples_broken(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    net.eval()
    stopped = PGD(0.3, 0.1, 6, loss="margin", stop_when_broken=True)(net, x, y, generator=seeded()).inputs
    whole = PGD(0.3, 0.1, 6, loss="margin")(net, x, y, generator=seeded()).inputs
    broken = margin(net(stopped), y) > 0
    assert broken.any()
    assert (broken >= (margin(net(whole), y) > 0)).all()
    # Those that stood to the end took every step, so they are where the unstopped attack left them.
    torch.testing.assert_close(stopped[~broken], whole[~broken])


def friendly(
    net: nn.Module, x: Tensor, y: Tensor, start: Tensor, steps: int, tau: int
) -> tuple[Tensor, Tensor, list[bool]]:
    """Algorithm 1 of Zhang et al. (2020): where each example ends, where it was one step before, and if it stopped."""
    ends, before, stopped = [], [], []
    for x_i, y_i, x_adv in zip(x.split(1), y.split(1), start.split(1), strict=True):
        left, stop, previous = tau, False, x_adv
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            logits = net(x_adv)
            previous = x_adv.detach()
            if logits.argmax(dim=1) != y_i:
                if left == 0:
                    stop = True
                    break
                left -= 1
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y_i), x_adv)
            x_adv = (x_adv.detach() + 0.03 * gradient.sign()).clamp(x_i - 0.15, x_i + 0.15).clamp(0, 1)
        ends.append(x_adv.detach())
        before.append(previous)
        stopped.append(stop)
    return torch.cat(ends), torch.cat(before), stopped


@given(
    n=st.integers(1, 9), steps=st.integers(1, 6), tau=st.integers(0, 3), seed=st.integers(0, 99), whole=st.booleans()
)
def test_stopping_is_algorithm_1_of_fat(n: int, steps: int, tau: int, seed: int, whole: bool) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x = torch.rand(n, 3, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        y = net(x).argmax(dim=1)
    attack = PGD(0.15, 0.03, steps, stop_when_broken=True, patience=tau)
    noise = attack.draw(x.shape, seeded(seed), dtype=x.dtype, device="cpu")
    ends, before, stopped = friendly(net, x, y, (x + noise).clamp(0, 1), steps, tau)
    plain = Standin(net) if whole else None
    found = attack(net, x, y, noise=noise, plain=plain)
    torch.testing.assert_close(found.inputs, ends, rtol=0, atol=1e-12)
    if plain is not None:
        assert set(plain.rows) == {n}

    model = engm.GradNormModule(net)
    measured = attack(model, x, y, noise=noise, plain=plain, measure=True)
    torch.testing.assert_close(measured.inputs, ends, rtol=0, atol=1e-12)
    assert measured.measurement is not None
    # Those that stopped are measured where they are, the others where they took their last step from.
    at = torch.where(torch.tensor(stopped).view(-1, 1, 1, 1), ends, before)
    losses = cross_entropy(model(at.requires_grad_()), y)
    (gradient,) = torch.autograd.grad(losses.sum(), at, retain_graph=True)
    torch.testing.assert_close(measured.measurement.norms, engm.naive_grad_norms(model, losses))
    torch.testing.assert_close(measured.measurement.losses, losses.detach())
    torch.testing.assert_close(measured.measurement.input_grads, gradient)
    torch.testing.assert_close(measured.measurement.input_norms, gradient.flatten(1).norm(dim=1))

    alone = attack(
        model, x, y, noise=noise, plain=plain, measure=engm.NENGM(model, torch.optim.SGD(net.parameters()), 1.0)
    )
    torch.testing.assert_close(alone.inputs, ends, rtol=0, atol=1e-12)
    assert alone.measurement is not None
    assert alone.measurement.stacked is None
    torch.testing.assert_close(alone.measurement.input_grads, gradient)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (0, [32, 32, 32, 32]),  # nobody stops: the last step measures all
        (32, [32]),  # all stop at once, and are measured there
        (25, [32, 7, 7, 8]),  # the first pass measures those that stop, the last the others and one that fills up
        (5, [32, 27, 27, 32]),  # too few stop for a pass over all to measure them
    ],
)
def test_examples_are_measured_in_the_pass_in_which_they_stop(stop: int, expected: list[int]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    model, x = engm.GradNormModule(net), torch.rand(32, 3, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        y = net(x).argmax(dim=1)
    y[:stop] = (y[:stop] + 1) % 3
    rows: list[int] = []
    net[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    found = PGD(1e-4, 1e-5, 4, stop_when_broken=True, random_start=False)(model, x, y, measure=True)
    assert rows == expected
    assert found.measurement is not None
    assert found.measurement.mode == "plain"
    at = torch.cat([x[:stop], (found.inputs - 1e-5 * found.measurement.input_grads.sign())[stop:]])
    torch.testing.assert_close(found.measurement.norms, engm.naive_grad_norms(model, cross_entropy(model(at), y)))


def test_the_measuring_pass_runs_when_all_have_stopped(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, _ = batch
    model = engm.GradNormModule(net.eval())
    wrong = (model(x).argmax(dim=1) + 1) % 3
    attack = PGD(0.1, 0.03, 10, stop_when_broken=True, random_start=False)
    plain = Standin(net)
    found = attack(model, x, wrong, measure=True, plain=plain)
    assert plain.rows == [12]  # one look, nobody left
    assert torch.equal(found.inputs, x)
    assert found.measurement is not None
    torch.testing.assert_close(found.measurement.norms, engm.naive_grad_norms(model, cross_entropy(model(x), wrong)))


def test_training_mode_computes_the_whole_batch_whoever_stopped(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x = batch[0]
    net[3].p = 0.0
    rows: list[int] = []
    net[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    net.train()
    labels = net(x).argmax(dim=1)
    labels[:3] = (labels[:3] + 1) % 3  # stop at once
    rows.clear()
    found = PGD(0.01, 0.001, 3, eval_mode=False, stop_when_broken=True, random_start=False)(net, x, labels).inputs
    assert rows == [12] * 3
    assert torch.equal(found[:3], x[:3])
    whole = PGD(0.01, 0.001, 1, eval_mode=False, random_start=False)(net, x, labels).inputs
    once = PGD(0.01, 0.001, 1, eval_mode=False, stop_when_broken=True, random_start=False)(net, x, labels).inputs
    assert torch.equal(once[3:], whole[3:])


def test_training_mode_takes_all_steps_even_if_all_have_stopped(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """What running statistics and generators see does not hang on the data, so that the step can be recorded."""
    x = batch[0]
    rows: list[int] = []
    net[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    net.eval()
    wrong = (net(x).argmax(dim=1) + 1) % 3
    rows.clear()
    found = PGD(0.1, 0.03, 4, eval_mode=False, stop_when_broken=True, random_start=False)(net, x, wrong).inputs
    assert rows == [12] * 4
    assert torch.equal(found, x)
