"""Training losses against their formulas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from engm.adversarial import OBJECTIVES, VANILLA, vanilla


def test_vanilla_is_cross_entropy_at_the_adversarial_input() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, x_adv, y = torch.rand(5, 1, 2, 2), torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 1, 0])
    expected = torch.stack([F.cross_entropy(net(x_adv[i : i + 1]), y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(vanilla(net, x_adv, y), expected)
    torch.testing.assert_close(VANILLA.losses(net, x, x_adv, y), expected)


def test_objectives_are_found_by_name() -> None:
    assert OBJECTIVES["vanilla"] is VANILLA
    assert VANILLA.attack_maximises_it
