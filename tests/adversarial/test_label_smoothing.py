"""Label smoothing of the training loss, against torch's; MART, which has none; and whose norms may be borrowed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engm.adversarial import objective
from engm.adversarial.objectives import NOT_SMOOTHED, OBJECTIVES, vanilla


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).double()
    x = torch.rand(7, 3, 2, 2, dtype=torch.float64)
    return net, x, (x + 0.1 * torch.randn_like(x)).clamp(0, 1), torch.arange(7) % 5


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_losses_are_torchs(smoothing: float) -> None:
    net, x, x_adv, y = problem()

    def torchs(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)

    for name in ("pgd", "fat", "ates"):
        found = objective(name, label_smoothing=smoothing).losses(net, x, x_adv, y)
        torch.testing.assert_close(found, torchs(net(x_adv)), rtol=1e-12, atol=1e-12)
    p, log_q = net(x).softmax(1), net(x_adv).log_softmax(1)
    expected = torchs(net(x)) + 3.0 * F.kl_div(log_q, p, reduction="none").sum(1)
    for name in ("trades", "backward-smoothing"):
        found = objective(name, beta=3.0, label_smoothing=smoothing).losses(net, x, x_adv, y)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_attack_is_the_same_and_lends_no_norms() -> None:
    for name in OBJECTIVES:
        if name in NOT_SMOOTHED:
            continue
        plain, smoothed = objective(name), objective(name, label_smoothing=0.1)
        assert smoothed.attack(0.1, 0.02, 3, "linf") == plain.attack(0.1, 0.02, 3, "linf")
        assert not smoothed.attack_maximises_it


def test_none_is_no_other_bit() -> None:
    net, _, x_adv, y = problem()
    assert torch.equal(vanilla(net, x_adv, y), F.cross_entropy(net(x_adv), y, reduction="none"))


def test_where_it_has_no_meaning_it_is_refused() -> None:
    with pytest.raises(ValueError, match="label_smoothing is not for mart: its boosted cross-entropy"):
        objective("mart", label_smoothing=0.1)
    with pytest.raises(ValueError, match="label_smoothing is not for self-adaptive: its labels are soft already"):
        objective("self-adaptive", label_smoothing=0.1)
    with pytest.raises(ValueError, match="label_smoothing is not for lbgat: its robust network sees no label"):
        objective("lbgat", label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\), got 1.5"):
        objective("pgd", label_smoothing=1.5)
