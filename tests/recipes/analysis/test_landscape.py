"""Landscapes that are known in closed form, the directions they are drawn along, and what must be left alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from engm.adversarial import PGD
from engm.recipes.analysis import level_sets, loss_landscape, roughness

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
ATTACK = PGD(0.1, 0.04, 4)
OFFSET = 50.0  # log(1 + exp(L)) is L to the last bit at L this large


class Bowl(nn.Module):
    """Its cross-entropy at label 1 is ``50 + bend * ||x - 0.3||^2``."""

    def __init__(self, bend: float = 2.0) -> None:
        super().__init__()
        self.bend = nn.Parameter(torch.tensor(bend, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        height = OFFSET + self.bend * (x - 0.3).square().flatten(1).sum(1)
        return torch.stack([height, torch.zeros_like(height)], dim=1)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(80, 3)).double()


def examples(n: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, *(shape or (1, 4, 5)), generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


@given(
    n=st.integers(1, 3),
    shape=st.sampled_from([(2,), (1, 3, 2), (3, 2, 5)]),
    points=st.sampled_from([3, 5, 11]),
    span=st.floats(0.3, 30),
    norm=st.sampled_from(["linf", "l2"]),
)
def test_a_bowl_in_closed_form(n: int, shape: tuple[int, ...], points: int, span: float, norm: str) -> None:
    x, _ = examples(n, *shape)
    attack = PGD(0.1, 0.04, 3, norm=norm)  # type: ignore[arg-type]
    found = loss_landscape(Bowl(), x, torch.ones(n).long(), attack, span=span, points=points)
    assert found.losses.shape == (n, points, points)
    for i in range(n):
        for j, a in enumerate(torch.linspace(-span, span, points, dtype=torch.float64)):
            for k, b in enumerate(torch.linspace(-span, span, points, dtype=torch.float64)):
                at = x[i] + a * found.along[i] + b * found.across[i]  # far outside of [0, 1] too
                wanted = OFFSET + 2 * (at - 0.3).square().sum()
                torch.testing.assert_close(found.losses[i, j, k], wanted, rtol=1e-12, atol=0)
    lengths = found.along.flatten(1).square().sum(1)
    torch.testing.assert_close(roughness(found.losses, found.coordinates), 2 * 2 * lengths, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_directions(norm: str) -> None:
    x, y = examples(5)
    found = loss_landscape(network(), x, y, PGD(0.1, 0.04, 4, norm=norm), span=1.0, points=3)  # type: ignore[arg-type]
    u, v = found.along.flatten(1), found.across.flatten(1)
    torch.testing.assert_close(v.norm(dim=1), u.norm(dim=1), rtol=1e-12, atol=0)
    assert ((u * v).sum(1).abs() < 1e-12 * u.norm(dim=1).square()).all()
    assert (u.abs() <= 0.1 + 1e-12).all()


def test_centre_and_edge_are_the_natural_and_the_adversarial_loss() -> None:
    net, (x, y) = network(), examples(4)
    found = loss_landscape(net, x, y, ATTACK, span=1.0, points=5)
    net.eval()
    with torch.no_grad():
        natural = F.cross_entropy(net(x), y, reduction="none")
        adversarial = F.cross_entropy(net(x + found.along), y, reduction="none")
        across = F.cross_entropy(net(x + 0.5 * found.across), y, reduction="none")
    assert found.coordinates.tolist() == [-1, -0.5, 0, 0.5, 1]
    torch.testing.assert_close(found.losses[:, 2, 2], natural)
    torch.testing.assert_close(found.losses[:, 4, 2], adversarial)
    torch.testing.assert_close(found.losses[:, 2, 3], across)
    assert (adversarial > natural).all()


def test_the_seed_decides_and_the_chunks_do_not() -> None:
    net, (x, y) = network(), examples(3)
    first = loss_landscape(net, x, y, ATTACK, span=2.0, points=5)
    torch.manual_seed(99)
    again = loss_landscape(net, x, y, ATTACK, span=2.0, points=5, batch_size=7)
    torch.testing.assert_close(first.losses, again.losses, rtol=1e-12, atol=1e-12)
    assert torch.equal(first.across, again.across)
    other = loss_landscape(net, x, y, ATTACK, span=2.0, points=5, seed=1)
    cosine = F.cosine_similarity(first.across.flatten(), other.across.flatten(), dim=0)
    assert abs(cosine) < 0.6


@pytest.mark.parametrize("points", [7, 11, 21])
def test_the_middle_is_the_example_itself(points: int) -> None:
    x, y = examples(1)
    found = loss_landscape(network(), x, y, ATTACK, span=0.7, points=points)
    assert found.coordinates[points // 2] == 0
    assert torch.equal(found.coordinates, -found.coordinates.flip(0))


def test_the_random_direction_is_not_that_of_the_start() -> None:
    """One weak l2 step: u is nearly the start, so v would be nothing but what rounding leaves of it."""
    x = torch.full((3, 1, 8, 8), 0.5, dtype=torch.float64)
    attack = PGD(0.1, 1e-6, 1, norm="l2")
    found = loss_landscape(Bowl(), x, torch.ones(3).long(), attack, span=1.0, points=3)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    assert (F.cosine_similarity(found.across.flatten(1), noise.flatten(1)) > 0.9).all()


def test_two_networks_are_cut_along_one_random_direction() -> None:
    x, _ = examples(2, 3, 8, 8)
    label = torch.ones(2).long()
    attack = PGD(0.1, 0.2, 1)  # one step to the corner that both bowls, alike in shape, have uphill
    one, other = (loss_landscape(Bowl(bend), x, label, attack, span=1.0, points=3) for bend in (1.0, 3.0))
    torch.testing.assert_close(one.along, other.along)
    torch.testing.assert_close(one.across, other.across)


@pytest.mark.parametrize("eval_mode", [True, False])
def test_leaves_everything_as_it_was(eval_mode: bool, untouched: Untouched) -> None:
    net, (x, y) = network(), examples(3)
    net[3].eval()
    with untouched(net):
        found = loss_landscape(net, x, y, replace(ATTACK, eval_mode=eval_mode), span=1.0, points=3)
    assert not found.losses.requires_grad
    assert not found.along.requires_grad
    assert x.grad is None


def test_level_sets_are_joint_over_networks_and_apart_over_examples() -> None:
    one = torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[5.0, 5.0], [5.0, 6.0]]])
    other = torch.tensor([[[1.0, 9.0], [2.0, 3.0]], [[4.0, 5.0], [5.0, 5.0]]])
    levels = level_sets([one, other], 4)
    assert levels.tolist() == [pytest.approx([0, 3, 6, 9]), pytest.approx([4, 4 + 2 / 3, 4 + 4 / 3, 6])]
    assert level_sets([one], 2).tolist() == [[0, 3], [5, 6]]


def test_a_plane_is_not_rough() -> None:
    coordinates = torch.linspace(-2, 2, 7, dtype=torch.float64)
    plane = (3 * coordinates[:, None] - coordinates[None, :])[None]
    assert roughness(plane, coordinates).tolist() == pytest.approx([0], abs=1e-12)
    parabola = (coordinates.square()[:, None] + 0 * coordinates[None, :])[None]  # bent by 2 along u, by 0 along v
    assert roughness(torch.cat([parabola, 4 * parabola]), coordinates).tolist() == pytest.approx([1, 4])


def test_bad_arguments() -> None:
    net, (x, y) = network(), examples(3)
    for points, span in ((4, 1.0), (1, 1.0), (3, 0.0), (3, -1.0), (3, float("nan"))):
        with pytest.raises(ValueError, match=r"odd number.*positive span"):
            loss_landscape(net, x, y, ATTACK, points=points, span=span)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(20, 3)).double()
    nn.init.zeros_(flat[1].weight)
    with pytest.raises(ValueError, match="did not move example 0"):
        loss_landscape(flat, x, y, PGD(0.1, 0.04, 2, random_start=False), span=1.0)
    with pytest.raises(ValueError, match="at least 2 levels"):
        level_sets([x], 1)
    with pytest.raises(ValueError, match="landscape"):
        level_sets([], 5)
