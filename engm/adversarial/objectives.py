"""What methods of adversarial training minimise: one loss an example, from natural and adversarial inputs.

A method is one function that a reader can hold against its paper. :class:`Objective` says, beside the function, what a
trainer has to know about the method: the attack that it trains against, and whether that attack maximises the very loss
that training minimises, so that norms measured in its last step may be borrowed for the update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_name
from .attacks import PGD
from .ball import Norm
from .losses import kl_divergence, log_probabilities

AttackMaker = Callable[[float, float, int, Norm], PGD]
"""``(eps, step_size, steps, norm) -> PGD``: what makes a method's attack for a ball and a number of steps."""

# Deviation of the normal draw that TRADES and MART start from: at x itself the gradient of TRADES' KL is zero.
_START_NOISE = 0.001
# Deviation of the normal draw that every step of FAT's attack adds: omega of the authors' code.
_STEP_NOISE = 0.001


NOT_SMOOTHED = (
    "its boosted cross-entropy compares the label with the strongest other class, and its weights are of the label's "
    "own probability, which smoothed labels have not"
)
"""Why MART takes no label smoothing, for messages."""


def vanilla(model: nn.Module, x_adv: Tensor, y: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """``CE(F(x'), y)`` of every example, ``[n]``, in nats (Madry et al., 2018; Eq. 1 of Dabouei et al., 2022).

    Args:
        model: maps inputs to logits ``[n, K]``.
        x_adv: adversarial inputs ``[n, ...]``.
        y: labels ``[n]``.
        label_smoothing: share of the label that all classes have alike, in [0, 1].
    """
    return F.cross_entropy(model(x_adv), y, reduction="none", label_smoothing=label_smoothing)


def trades(
    model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, beta: float = 6.0, label_smoothing: float = 0.0
) -> Tensor:
    """``CE(F(x), y) + beta KL(p(x) || p(x'))`` of every example, ``[n]``, in nats (Zhang et al., TRADES, 2019).

    The gradient flows through ``p(x)`` too. There are two forward passes, the natural one first. Losses are computed in
    float32 where the logits have less, and are finite however confident the network is.

    Args:
        model: maps inputs to logits ``[n, K]``.
        x: natural inputs ``[n, ...]``.
        x_adv: adversarial inputs, shaped alike.
        y: labels ``[n]``.
        beta: weight of the KL term, their ``1 / lambda``.
        label_smoothing: share of the label that all classes have alike in the cross-entropy, in [0, 1]. The KL term
            knows no label.
    """
    natural, adversarial = log_probabilities(model(x)), log_probabilities(model(x_adv))
    loss = F.nll_loss(natural, y, reduction="none")
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * natural.mean(dim=1)
    return loss + beta * kl_divergence(natural, adversarial)


def mart(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, beta: float = 6.0) -> Tensor:
    """``BCE(p(x'), y) + beta (1 - p_y(x)) KL(p(x) || p(x'))`` of every example, ``[n]`` (Wang et al., MART, 2020).

    ``BCE(p', y) = -log p'_y - log(1 - max_{k != y} p'_k)`` is their boosted cross-entropy. Both ``1 -`` carry the small
    constants of the authors' code, which keep the logarithm finite: ``log(1.0001 - max p' + 1e-12)``, ``1.0000001 -
    p_y``. There are two forward passes, the natural one first; the precision is that of :func:`trades`.

    Args:
        model: maps inputs to logits ``[n, K]`` with ``K >= 2``.
        x: natural inputs ``[n, ...]``.
        x_adv: adversarial inputs, shaped alike.
        y: labels ``[n]``.
        beta: weight of the KL term, their ``lambda``.
    """
    natural, adversarial = log_probabilities(model(x)), log_probabilities(model(x_adv))
    own = y.unsqueeze(1)
    strongest_other = adversarial.exp().scatter(1, own, 0.0).amax(dim=1)
    boosted = F.nll_loss(adversarial, y, reduction="none") - torch.log(1.0001 - strongest_other + 1e-12)
    doubt = 1.0000001 - natural.exp().gather(1, own).squeeze(1)
    return boosted + beta * doubt * kl_divergence(natural, adversarial)


@dataclass(frozen=True)
class Objective:
    """A method of adversarial training: its loss, its attack, and what a trainer needs to know about them.

    Attributes:
        name: as users type it.
        losses: ``(model, x, x_adv, y) -> [n]`` with natural inputs ``x``, adversarial ones ``x_adv`` and labels ``y``.
        attack_maximises_it: whether the attack maximises this very loss, so that its last step may measure the norms.
        attack: ``(eps, step_size, steps, norm) -> PGD``, the method's own inner problem.
    """

    name: str
    losses: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    attack_maximises_it: bool
    attack: AttackMaker


OBJECTIVES = ("pgd", "trades", "mart", "fat")
"""Names that :func:`objective` knows; ``"vanilla"`` is another name of ``"pgd"``."""


def objective(
    name: str,
    *,
    beta: float = 6.0,
    patience: int = 0,
    eval_mode: bool = True,
    label_smoothing: float = 0.0,
) -> Objective:
    """A method by its name.

    ======== ============================= ============================================= ==================
    name     loss                          attack maximises, from                        norms may be borrowed
    ======== ============================= ============================================= ==================
    pgd      :func:`vanilla`               cross-entropy, uniform in the ball            yes
    trades   :func:`trades`                KL(p(x) || p(x')), x + 0.001 normal           no
    mart     :func:`mart`                  cross-entropy, x + 0.001 normal               no
    fat      :func:`vanilla`               cross-entropy, uniform, stops when it has won yes
    ======== ============================= ============================================= ==================

    FAT (Zhang et al., *Attacks Which Do Not Kill Training Make Adversarial Learning Stronger*, 2020) trains on friendly
    examples: an example takes ``patience`` more steps after it is misclassified, and then stays where it is. Each step
    adds 0.001 times a normal draw, as in the authors' code.

    What differs from the authors' code on purpose: an l2 step is projected onto the ball and then onto [0, 1], as in
    Rice et al. (2020), where TRADES does it the other way round, so that one projection serves all methods; an example
    whose l2 gradient is zero stays, where TRADES moves it at random, so that what is drawn hangs on no value; MART has
    l2 too; and FAT's noise is drawn for examples that have stopped as well, so that several processes draw alike.

    Args:
        name: one of :data:`OBJECTIVES`.
        beta: weight of the KL term in TRADES and MART; the others have none.
        patience: ``tau`` of FAT, in steps; the others have none. The authors' code raises ``tau`` from 0 in the course
            of training: for that make the objective anew.
        eval_mode: attack the network in evaluation mode, as the authors of TRADES, MART and FAT do; see
            :class:`PGD`.
        label_smoothing: share of the label that all classes have alike, in [0, 1). It is of the training loss alone:
            attacks climb the loss of the label itself, as in Pang et al. (*Bag of Tricks for Adversarial Training*,
            2021), and so norms may not be borrowed from them.

    Raises:
        ValueError: the name is not known, ``beta`` is negative or not finite, ``patience`` is negative,
            ``label_smoothing`` out of range or positive with MART, where it has no meaning.
    """
    if not (beta >= 0 and isfinite(beta)):
        raise ValueError(f"beta must be a finite number >= 0, got {beta}")
    if patience < 0:
        raise ValueError(f"patience must be a number of steps >= 0, got {patience}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    if label_smoothing and name == "mart":
        raise ValueError(f"label_smoothing is not for mart: {NOT_SMOOTHED}")
    smoothed = partial(_vanilla, label_smoothing=label_smoothing) if label_smoothing else _vanilla
    if name != "vanilla":
        check_name(name, OBJECTIVES, what="objective")
    match name:
        case "trades":
            attack = partial(PGD, loss="kl", start_noise=_START_NOISE, eval_mode=eval_mode)
            return Objective(name, partial(trades, beta=beta, label_smoothing=label_smoothing), False, attack)
        case "mart":
            attack = partial(PGD, start_noise=_START_NOISE, eval_mode=eval_mode)
            return Objective(name, partial(mart, beta=beta), False, attack)
        case "fat":
            attack = partial(PGD, stop_when_broken=True, patience=patience, step_noise=_STEP_NOISE, eval_mode=eval_mode)
            return Objective(name, smoothed, not label_smoothing, attack)
        case _:
            return Objective("pgd", smoothed, not label_smoothing, partial(PGD, eval_mode=eval_mode))


def _vanilla(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """:func:`vanilla` with the arguments that all objectives take."""
    return vanilla(model, x_adv, y, label_smoothing=label_smoothing)


VANILLA = objective("pgd")
