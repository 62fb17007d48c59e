"""A little network, and the claim of every hostile test: the norms are right, or there is one clear error."""

from __future__ import annotations

from typing import Any

import torch
from hostile.observers import outcome
from oracle import per_example_gradients, relative, trained
from torch import Tensor, nn

import engm


def network(*extra: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), *extra).double()


def assert_right(model: engm.GradNormModule, losses: Tensor) -> None:
    """The norms are those of plain torch on the same graph."""
    expected = per_example_gradients(losses, trained(model.unwrap())).norms
    assert relative(engm.per_example_grad_norms(model, losses), expected) <= 1e-9


def assert_right_or_refused(model: engm.GradNormModule, losses: Tensor) -> None:
    refusal = outcome(assert_right, model, losses)
    assert refusal is None or str(refusal).startswith("engm: ")


def optimizer(model: engm.GradNormModule, **options: Any) -> engm.ENGM:
    return engm.ENGM(model, torch.optim.SGD(model.parameters(), lr=0.1), **{"alpha": 1.0, **options})
