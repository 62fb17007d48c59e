"""Natural and robust accuracy, always in evaluation mode and with nothing captured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from engm.adversarial import PGD, evaluation_mode, paused
from engm.checks import NonFiniteError

from .data import Source
from .processes import Processes

OnBatch = Callable[[int, int], None]
"""Called between the batches of an evaluation with how many are done and how many there are; may raise to end it."""


def pgd20(eps: float, norm: Literal["linf", "l2"] = "linf", steps: int = 20) -> PGD:
    """The paper's evaluation attack: 20 steps of eps/10 on the margin loss from a random start.

    An example counts as broken once any step has broken it, which is a little stronger than looking at the last
    step alone, and cheaper.

    Args:
        eps: radius; with 0 the attack does nothing.
        norm: norm of the ball.
        steps: number of steps. From 20 on their size is eps/10; fewer are so long that they could cross the ball.
    """
    step = max(eps / 10, 2 * eps / steps) if steps < 20 else eps / 10
    return PGD(eps, step or 1.0, steps, norm=norm, loss="margin", stop_when_broken=True)


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


def overfit(best: float, last: float) -> float:
    """Robust overfitting as the paper defines it: (best - last) / best, robust accuracies of the two checkpoints."""
    return (best - last) / best if best > 0 else 0.0


def evaluate(
    model: nn.Module,
    split: Source,
    attack: PGD | None = None,
    *,
    batch_size: int = 500,
    seed: int = 0,
    processes: Processes | None = None,
    on_batch: OnBatch | None = None,
    made_on: nn.Module | None = None,
) -> Accuracy:
    """Accuracy of ``model`` on ``split``, natural and under ``attack``.

    Args:
        model: any classifier; its mode is restored, its gradients are not touched.
        split: the examples, on the model's device.
        attack: ``None`` for natural accuracy only. Should run in evaluation mode.
        batch_size: examples at a time.
        seed: seed of the attack's random starts; the same starts for every model.
        processes: several processes that share the batches; all of them get the accuracy of the whole split.
        on_batch: called after each of this process's batches with the number of those done and of all.
        made_on: another network that the attack is made on, whose adversarial examples ``model`` then classifies.

    Raises:
        ValueError: an empty split, or an attack that would run in training mode.
        NonFiniteError: the network gives outputs that are not finite, so that its classes mean nothing.
    """
    if not len(split):
        raise ValueError("expected at least one example to evaluate on, got none")
    if attack is not None and not attack.eval_mode:
        raise ValueError("evaluation needs an attack in evaluation mode: PGD(..., eval_mode=True)")
    rank, world = (0, 1) if processes is None else (processes.rank, processes.world)
    numbers = range(-(-len(split) // batch_size))[rank::world]
    rows = [torch.arange(k * batch_size, min((k + 1) * batch_size, len(split))) for k in numbers]
    natural = robust = broken = 0
    attacked = model if made_on is None else made_on
    with ExitStack() as stack:
        for network in {id(model): model, id(attacked): attacked}.values():
            stack.enter_context(evaluation_mode(network))
            stack.enter_context(paused(network))
        for number, (x, y) in zip(numbers, split.batches(rows), strict=True):
            correct, finite = _look(model, x, y)
            natural += correct
            broken += not finite
            if attack is not None and finite:
                # Every batch has a generator of its own, so that it does not matter which process attacks it.
                generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
                correct, finite = _look(model, attack(attacked, x, y, generator=generator).inputs, y)
                robust += correct
                broken += not finite
            if on_batch is not None:
                on_batch(number // world + 1, len(numbers))
    if processes is not None:
        natural, robust, broken = processes.total([natural, robust, broken])
    if broken:
        raise NonFiniteError("the network's outputs are not finite, so its accuracy means nothing")
    return Accuracy(natural / len(split), robust / len(split) if attack is not None else None, len(split))


@torch.no_grad()
def _look(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[int, bool]:
    """The number of examples classified correctly, and whether all outputs are finite."""
    logits = model(x)
    correct, finite = torch.stack([(logits.argmax(dim=1) == y).sum(), logits.isfinite().all().long()]).tolist()
    return correct, bool(finite)
