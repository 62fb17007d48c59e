"""Objectives as tests call them: with what they keep beside the network, where they keep something."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from engm.adversarial import Guide, LabelAverages, Objective, objective

LABELS = torch.tensor([0, 3, 1, 4, 2, 0, 1, 2, 4, 3])


def with_beside(name: str, net: nn.Module, **options: Any) -> Objective:
    """An objective for networks like ``net``: LBGAT's guide is one of its kind with other weights.

    Args:
        name: of the objective.
        net: a classifier with five classes.
        **options: of :func:`engm.adversarial.objective`.
    """
    if name == "lbgat":
        guide = copy.deepcopy(net)
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.mul_(0.7).add_(0.05)
        options["beside"] = Guide(guide, torch.optim.SGD(guide.parameters(), 0.1))
    elif name == "self-adaptive":
        averages = LabelAverages(LABELS, 5)
        averages.values = (0.8 * averages.values + 0.04).to(next(net.parameters()).dtype)
        options["beside"] = averages
    return objective(name, **options)


def losses_of_objective(chosen: Objective, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    """The losses of the first examples of the training set, ``[n]``."""
    beside = chosen.beside
    given = [] if beside is None else [beside.before(x, y, torch.arange(len(x)))]
    return chosen.losses(model, x, x_adv, y, *given)
