"""What methods of adversarial training minimise: one loss an example, from natural and adversarial inputs.

A method is one function that a reader can hold against its paper. :class:`Objective` says, beside the function, what a
trainer has to know about the method: the attack that it trains against, and whether that attack maximises the very loss
that training minimises, so that norms measured in its last step may be borrowed for the update.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from math import isfinite

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_name
from ..distributed import means
from ..names import BETAS, NOT_SMOOTHED, OBJECTIVES
from .attacks import PGD
from .backward_smoothing import BackwardSmoothing
from .ball import Norm
from .beside import Beside, Guide, GuideLogits, LabelAverages, SoftLabels
from .losses import kl_divergence, log_probabilities

AttackMaker = Callable[[float, float, int, Norm], PGD]
"""``(eps, step_size, steps, norm) -> PGD``: what makes a method's attack for a ball and a number of steps."""

# Deviation of the normal draw that TRADES and MART start from: at x itself the gradient of TRADES' KL is zero.
_START_NOISE = 0.001
# Deviation of the normal draw that every step of FAT's attack adds: omega of the authors' code.
_STEP_NOISE = 0.001


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


def lbgat(
    model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, guide_logits: Tensor, *, beta: float = BETAS["lbgat"]
) -> Tensor:
    """``||z(x') - g(x)||^2 / K + CE(g(x), y) + beta KL(p(x) || p(x'))`` of every example, ``[n]`` (Cui et al., 2021).

    Source: Cui et al., *Learnable Boundary Guided Adversarial Training*, ICCV 2021, and ``lbgat.py`` of the authors'
    code (dvlab-research/LBGAT, commit 021b7d7). The robust network's logits at ``x'`` are drawn to those of a natural
    network, the guide, at ``x``. There are two forward passes of ``model``, the adversarial one first; the natural one
    is there without ``beta`` too, because the running statistics have seen it in the authors' code. The precision is
    that of :func:`trades`.

    Args:
        model: maps inputs to logits ``[n, K]``.
        x: natural inputs ``[n, ...]``.
        x_adv: adversarial inputs, shaped alike.
        y: labels ``[n]``.
        guide_logits: the guide's logits ``[n, K]`` at ``x``; the gradient flows to them too.
        beta: weight of the KL term.
    """
    logits = model(x_adv)
    with nullcontext() if beta else torch.no_grad():
        natural = log_probabilities(model(x))
    precise = torch.promote_types(logits.dtype, torch.float32)
    logits, guide_logits = logits.to(precise), guide_logits.to(precise)
    loss = (logits - guide_logits).square().mean(dim=1) + F.cross_entropy(guide_logits, y, reduction="none")
    return loss + beta * kl_divergence(natural, log_probabilities(logits)) if beta else loss


def self_adaptive(
    model: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    labels: Tensor,
    *,
    momentum: float = 0.9,
    beta: float = BETAS["self-adaptive"],
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """``w CE(p(x), t) + beta KL(p(x) || p(x'))`` of every example, with soft labels ``t`` (Huang et al., 2020).

    Source: Huang et al., *Self-Adaptive Training: beyond Empirical Risk Minimization*, NeurIPS 2020, and ``TRADES_SAT``
    in ``losses/trades.py`` of the authors' code (LayneH/self-adaptive-training, commit 62033bf). The labels follow the
    predictions, ``t = momentum t + (1 - momentum) p(x)``, and an example weighs as much as its label is certain,
    ``w_i = max_k t_ik``, divided by the mean of these over the batch. No gradient flows through ``t`` and ``w``. There
    are two forward passes, the natural one first; the precision is that of :func:`trades`.

    Args:
        model: maps inputs to logits ``[n, K]``.
        x: natural inputs ``[n, ...]``.
        x_adv: adversarial inputs, shaped alike.
        labels: the soft labels before this step, ``[n, K]``.
        momentum: share of the old label in the new one, their ``alpha``.
        beta: weight of the KL term.
        group: the processes that share the batch, if there are several; the mean of the weights is taken over all.

    Returns:
        The losses ``[n]``, and the labels ``[n, K]`` after this step.
    """
    natural, adversarial = log_probabilities(model(x)), log_probabilities(model(x_adv))
    labels = momentum * labels + (1 - momentum) * natural.detach().exp()
    certainty = labels.amax(dim=1)
    (mean,) = means(group, certainty.double())
    losses = -(certainty / mean).to(natural.dtype) * (labels * natural).sum(dim=1)
    return losses + beta * kl_divergence(natural, adversarial), labels


@dataclass(frozen=True)
class Objective:
    """A method of adversarial training: its loss, its attack, and what a trainer needs to know about them.

    Attributes:
        name: as users type it.
        losses: ``(model, x, x_adv, y) -> [n]`` with natural inputs ``x``, adversarial ones ``x_adv`` and labels ``y``.
            Where there is something ``beside``, its ``before`` gives one argument more.
        attack_maximises_it: whether the attack maximises this very loss, so that its last step may measure the norms.
        attack: ``(eps, step_size, steps, norm) -> PGD``, the method's own inner problem.
        beside: what the method keeps and changes in training besides the network, if it does.
    """

    name: str
    losses: Callable[..., Tensor]
    attack_maximises_it: bool
    attack: AttackMaker
    beside: Beside | None = None


def objective(
    name: str,
    *,
    beta: float | None = None,
    patience: int = 0,
    gap: float = 1.0,
    gamma: float = 1.0,
    classes: int | None = None,
    momentum: float = 0.9,
    beside: Beside | None = None,
    eval_mode: bool = True,
    label_smoothing: float = 0.0,
) -> Objective:
    """A method by its name.

    ================== ====================== ============================================== ==================
    name               loss                   attack maximises, from                         norms may be borrowed
    ================== ====================== ============================================== ==================
    pgd                :func:`vanilla`        cross-entropy, uniform in the ball             yes
    trades             :func:`trades`         KL(p(x) || p(x')), x + 0.001 normal            no
    mart               :func:`mart`           cross-entropy, x + 0.001 normal                no
    fat                :func:`vanilla`        cross-entropy, uniform, stops when it has won  yes
    ates               :func:`vanilla`        cross-entropy, uniform, stops at a difficulty  yes
    backward-smoothing :func:`trades`         KL(p(x) || p(x')), :class:`BackwardSmoothing`  no
    lbgat              :func:`lbgat`          KL(p(x) || p(x')), x + 0.001 normal            no
    self-adaptive      :func:`self_adaptive`  KL(p(x) || p(x')), x + 0.001 normal            no
    ================== ====================== ============================================== ==================

    FAT (Zhang et al., *Attacks Which Do Not Kill Training Make Adversarial Learning Stronger*, 2020) trains on friendly
    examples: an example takes ``patience`` more steps after it is misclassified, and then stays where it is. Each step
    adds 0.001 times a normal draw, as in the authors' code.

    ATES (Sitawarin et al., *Improving Adversarial Robustness Through Progressive Hardening*, arXiv 2003.09347) leaves
    an example alone as soon as another class is more probable than its label by more than ``gap``, which rises in the
    course of training; with 1 no example stops. The test is that of ``_compute_mask`` in ``adv/adv_model.py`` of an
    author's code (chawins/adv-exp, commit 0aa756b; chawins/ates-minimal has the evaluation alone).

    What differs from the authors' code on purpose: an l2 step is projected onto the ball and then onto [0, 1], as in
    Rice et al. (2020), where TRADES does it the other way round, so that one projection serves all methods; an example
    whose l2 gradient is zero stays, where TRADES moves it at random, so that what is drawn hangs on no value; MART,
    LBGAT, backward smoothing and self-adaptive training have the l2 attack of these; and FAT's noise is drawn for
    examples that have stopped as well, so that several processes draw alike.

    Args:
        name: one of :data:`OBJECTIVES`.
        beta: weight of the KL term, where there is one; by default that of :data:`BETAS`.
        patience: ``tau`` of FAT, in steps; the others have none. The authors' code raises ``tau`` from 0 in the course
            of training: for that make the objective anew.
        gap: ``lambda`` of ATES, a difference of probabilities in [-1, 1]; for one that rises make the objective anew.
        gamma: size of the change of the logits in backward smoothing.
        classes: number of classes, for backward smoothing in several processes.
        momentum: share of the old label in the new one, in self-adaptive training.
        beside: LBGAT's :class:`Guide`; the :class:`LabelAverages` of self-adaptive training, which is TRADES without
            them, as in its first epochs.
        eval_mode: attack the network in evaluation mode, as the authors of all but PGD do; see :class:`PGD`.
        label_smoothing: share of the label that all classes have alike, in [0, 1). It is of the training loss alone:
            attacks climb the loss of the label itself, as in Pang et al. (*Bag of Tricks for Adversarial Training*,
            2021), and so norms may not be borrowed from them.

    Raises:
        ValueError: the name is not known, an argument is out of range, ``label_smoothing`` is positive where it has no
            meaning (:data:`NOT_SMOOTHED`), or something is ``beside`` a method that keeps nothing.
        TypeError: LBGAT without a :class:`Guide`, or self-adaptive training with something else than its averages.
    """
    if name != "vanilla":
        check_name(name, OBJECTIVES, what="objective")
    beta = BETAS.get(name, 0.0) if beta is None else beta
    if not (beta >= 0 and isfinite(beta)):
        raise ValueError(f"beta must be a finite number >= 0, got {beta}")
    if patience < 0:
        raise ValueError(f"patience must be a number of steps >= 0, got {patience}")
    if not -1 <= gap <= 1:
        raise ValueError(f"gap must lie in [-1, 1], between two probabilities, got {gap}")
    if not (gamma > 0 and isfinite(gamma)):
        raise ValueError(f"gamma must be a finite number > 0, got {gamma}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    if label_smoothing and name in NOT_SMOOTHED:
        raise ValueError(f"label_smoothing is not for {name}: {NOT_SMOOTHED[name]}")
    _check_beside(name, beside)
    climbed = not label_smoothing
    attack: AttackMaker
    smoothed = partial(_vanilla, label_smoothing=label_smoothing) if label_smoothing else _vanilla
    of_pair = partial(trades, beta=beta, label_smoothing=label_smoothing)
    towards_kl = partial(PGD, loss="kl", start_noise=_START_NOISE, eval_mode=eval_mode)
    match name:
        case "trades":
            return Objective(name, of_pair, False, towards_kl)
        case "mart":
            attack = partial(PGD, start_noise=_START_NOISE, eval_mode=eval_mode)
            return Objective(name, partial(mart, beta=beta), False, attack)
        case "fat":
            attack = partial(PGD, stop_when_broken=True, patience=patience, step_noise=_STEP_NOISE, eval_mode=eval_mode)
            return Objective(name, smoothed, climbed, attack)
        case "ates":
            attack = partial(PGD, stop_when_broken=True, stop_gap=gap, eval_mode=eval_mode)
            return Objective(name, smoothed, climbed, attack)
        case "backward-smoothing":
            attack = partial(BackwardSmoothing, gamma=gamma, classes=classes, eval_mode=eval_mode)
            return Objective(name, of_pair, False, attack)
        case "lbgat":
            return Objective(name, partial(_lbgat, beta=beta), False, towards_kl, beside)
        case "self-adaptive":
            adaptive = partial(_self_adaptive, momentum=momentum, beta=beta)
            return Objective(name, of_pair if beside is None else adaptive, False, towards_kl, beside)
        case _:
            return Objective("pgd", smoothed, climbed, partial(PGD, eval_mode=eval_mode))


def _check_beside(name: str, beside: Beside | None) -> None:
    """Refuses what is no part of a method, and a method without a part."""
    if name == "lbgat" and not isinstance(beside, Guide):
        raise TypeError(
            "lbgat trains a natural network beside the robust one: pass beside=engm.adversarial.Guide(net, optimizer), "
            f"got {type(beside).__name__}"
        )
    if name == "self-adaptive" and not isinstance(beside, LabelAverages | None):
        raise TypeError(
            "self-adaptive training keeps labels: pass beside=engm.adversarial.LabelAverages(labels, classes), got "
            f"{type(beside).__name__}"
        )
    if beside is not None and name not in ("lbgat", "self-adaptive"):
        raise ValueError(f"{name} keeps nothing beside the network: leave beside out")


def _vanilla(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """:func:`vanilla` with the arguments that all objectives take."""
    return vanilla(model, x_adv, y, label_smoothing=label_smoothing)


def _lbgat(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, given: GuideLogits, beta: float) -> Tensor:
    """:func:`lbgat` of what a :class:`Guide` gives."""
    return lbgat(model, x, x_adv, y, given.values, beta=beta)


def _self_adaptive(
    model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, given: SoftLabels, momentum: float, beta: float
) -> Tensor:
    """:func:`self_adaptive` of what :class:`LabelAverages` give, which take the moved labels back."""
    losses, given.after = self_adaptive(model, x, x_adv, given.before, momentum=momentum, beta=beta, group=given.group)
    return losses


VANILLA = objective("pgd")
