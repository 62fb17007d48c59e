"""Natural and robust accuracy, always in evaluation mode and with nothing captured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from engm.adversarial import PGD, evaluation_mode, paused

from .data import Split


def pgd20(eps: float) -> PGD:
    """The paper's evaluation attack: 20 steps of eps/10 on the margin loss from a random start.

    An example counts as broken once any step has broken it, which is a little stronger than looking at the last
    step alone, and cheaper.
    """
    return PGD(eps, eps / 10, 20, loss="margin", stop_when_broken=True)


@dataclass(frozen=True)
class Accuracy:
    """Fractions of a split, in [0, 1].

    Attributes:
        natural: classified correctly.
        robust: classified correctly under attack, or ``None`` if there was none.
        examples: size of the split.
    """

    natural: float
    robust: float | None
    examples: int


def evaluate(
    model: nn.Module, split: Split, attack: PGD | None = None, *, batch_size: int = 500, seed: int = 0
) -> Accuracy:
    """Accuracy of ``model`` on ``split``, natural and under ``attack``.

    Args:
        model: any classifier; its mode is restored, its gradients are not touched.
        split: the examples, on the model's device.
        attack: ``None`` for natural accuracy only. Should run in evaluation mode.
        batch_size: examples at a time.
        seed: of the attack's random starts; the same starts for every model.

    Raises:
        ValueError: an empty split, or an attack that would run in training mode.
    """
    if not len(split):
        raise ValueError("expected at least one example to evaluate on, got none")
    if attack is not None and not attack.eval_mode:
        raise ValueError("evaluation needs an attack in evaluation mode: PGD(..., eval_mode=True)")
    generator = torch.Generator().manual_seed(seed)
    natural = robust = 0
    with evaluation_mode(model), paused(model):
        for start in range(0, len(split), batch_size):
            x, y = split.inputs[start : start + batch_size], split.labels[start : start + batch_size]
            natural += _correct(model, x, y)
            if attack is not None:
                robust += _correct(model, attack(model, x, y, generator=generator).inputs, y)
    return Accuracy(natural / len(split), robust / len(split) if attack is not None else None, len(split))


@torch.no_grad()
def _correct(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    return int((model(x).argmax(dim=1) == y).sum())
