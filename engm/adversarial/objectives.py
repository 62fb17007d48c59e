"""Per-example training losses of adversarial training methods.

A method is one function that a reader can hold against its paper. `Objective` says, beside the function, the one
thing a trainer has to know about it: whether the attack maximises the very loss that training minimises, so that
norms measured in the attack's last step may be borrowed for the update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .attacks import cross_entropy


def vanilla(model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
    """``CE(F(x'), y)`` of every example, ``[n]`` (Madry et al., 2018; Eq. 1 of the paper).

    Args:
        model: maps inputs to logits ``[n, K]``.
        x_adv: adversarial inputs ``[n, ...]``.
        y: labels ``[n]``.
    """
    return cross_entropy(model(x_adv), y)


@dataclass(frozen=True)
class Objective:
    """A training loss, and what a trainer needs to know about it.

    Attributes:
        name: as users type it.
        losses: ``(model, x, x_adv, y) -> [n]`` with natural inputs ``x``, adversarial ones ``x_adv`` and labels ``y``.
        attack_maximises_it: the attack climbs this very loss, so its last step may measure the norms.
    """

    name: str
    losses: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    attack_maximises_it: bool


VANILLA = Objective("vanilla", lambda model, x, x_adv, y: vanilla(model, x_adv, y), attack_maximises_it=True)

OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in (VANILLA,)}
