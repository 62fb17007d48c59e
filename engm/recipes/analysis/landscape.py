"""The loss around an example: along its adversarial perturbation and across it (paper, section 3.2, Fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engm.adversarial import PGD, evaluation_mode, paused
from engm.adversarial.ball import lengths, per_example

from .batches import losses_of


@dataclass(frozen=True)
class Landscape:
    """Losses on a plane through every example, at ``x + a u + b v``.

    Attributes:
        losses: ``[n, P, P]``, nats, on the CPU; the first of the two axes is ``a``.
        coordinates: ``[P]``, the values of ``a`` and of ``b``; the middle one is 0.
        along: ``u [n, ...]``, the adversarial perturbation.
        across: ``v``, a random direction orthogonal to ``u`` and as long.
    """

    losses: Tensor
    coordinates: Tensor
    along: Tensor
    across: Tensor


@torch.no_grad()
def loss_landscape(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: PGD,
    *,
    span: float = 2.0,
    points: int = 21,
    seed: int = 0,
    batch_size: int = 512,
) -> Landscape:
    """Cross-entropy on the plane of the adversarial perturbation and a random direction, made orthogonal to it.

    The network is in evaluation mode, and points outside of [0, 1] are not clamped: the plane stays a plane.

    Args:
        net: the network; nothing of it changes.
        x: natural inputs ``[n, ...]`` in [0, 1].
        y: labels ``[n]``.
        attack: finds ``u``.
        span: largest coordinate, in lengths of ``u``.
        points: number of points along a side; odd, so that ``x`` itself is one of them.
        seed: seed of the attack's start and of ``v``; the same ``v`` before it is made orthogonal for every network.
        batch_size: number of points at a time.

    Raises:
        ValueError: ``points`` is even or below 3, ``span`` is not positive, or an attack left its example in place.
    """
    if points < 3 or points % 2 == 0 or not span > 0:
        raise ValueError(f"expected an odd number of at least 3 points and a positive span, got {points} and {span}")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    with evaluation_mode(net):  # whatever mode the attack would leave the network in
        along = attack(net, x, y, generator=generator).inputs - x  # the start is drawn after v, not once more
    size = lengths(along)
    if bool((size == 0).any()):
        raise ValueError(f"the attack did not move example {int((size == 0).nonzero()[0])}: there is no direction")
    share = (noise * along).flatten(1).sum(1) / size.square()
    across = noise - per_example(share, noise) * along
    across = across * per_example(size / lengths(across), across)
    half = points // 2
    steps = torch.arange(-half, half + 1, dtype=x.dtype, device=x.device) / half * span  # linspace can miss the 0
    a, b = (grid.reshape(-1) for grid in torch.meshgrid(steps, steps, indexing="ij"))
    rows = []
    with evaluation_mode(net), paused(net):
        for origin, label, u, v in zip(x, y, along, across, strict=True):
            found = [
                losses_of(net, origin + per_example(p, u[None]) * u + per_example(q, v[None]) * v, label.expand(len(p)))
                for p, q in zip(a.split(batch_size), b.split(batch_size), strict=True)
            ]
            rows.append(torch.cat(found).reshape(points, points).cpu())
    return Landscape(torch.stack(rows), steps.cpu(), along, across)


def level_sets(landscapes: Sequence[Tensor], count: int) -> Tensor:
    """Levels that are the same for every network: equally spaced, for each example, over what all of them reach.

    Args:
        landscapes: the ``losses [n, P, P]`` of each network.
        count: levels an example.

    Returns:
        ``[n, count]``.

    Raises:
        ValueError: no landscape, or fewer than two levels.
    """
    if not landscapes or count < 2:
        raise ValueError(f"expected a landscape and at least 2 levels, got {len(landscapes)} and {count}")
    joint = torch.stack([losses.flatten(1) for losses in landscapes])
    low, high = joint.amin(dim=(0, 2)), joint.amax(dim=(0, 2))
    return low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, count, dtype=low.dtype)


def roughness(losses: Tensor, coordinates: Tensor) -> Tensor:
    """How bent the loss is: mean of its absolute second derivatives along both directions, by differences.

    A number for "smoother" that is ours; the paper shows pictures only.

    Args:
        losses: ``[n, P, P]``.
        coordinates: ``[P]``, equally spaced.

    Returns:
        ``[n]``, nats per squared length of the perturbation.
    """
    step = (coordinates[1] - coordinates[0]).square()
    along = losses.diff(n=2, dim=1).abs().mean(dim=(1, 2))
    across = losses.diff(n=2, dim=2).abs().mean(dim=(1, 2))
    return (along + across) / (2 * step)
