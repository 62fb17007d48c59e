"""The losses that attacks maximise: from logits and labels to one value an example."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PerExampleLoss = Callable[[Tensor, Tensor], Tensor]
"""``(logits [n, K], labels [n]) -> losses [n]``; the attack maximises each of them."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every example, in nats: logits ``[n, K]``, labels ``[n]`` to ``[n]``."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``max_{k != y} z_k - z_y`` of every example: logits ``[n, K]``, labels ``[n]`` to ``[n]``.

    Positive exactly where the example is misclassified. Unlike cross-entropy its gradient does not vanish when the
    network is confident, which makes it the better loss to evaluate robustness with (Uesato et al., 2019).
    """
    own = labels.unsqueeze(1)
    others = logits.scatter(1, own, float("-inf")).amax(dim=1)
    return others - logits.gather(1, own).squeeze(1)


def probability_gap(logits: Tensor, labels: Tensor) -> Tensor:
    """``max_{k != y} p_k - p_y`` of every example, in [-1, 1]: logits ``[n, K]``, labels ``[n]`` to ``[n]``.

    It is the difficulty by which ATES stops an attack (Sitawarin et al., 2020): -1 where the network is certain of the
    label, 0 where another class is as likely, 1 where it is certain of another class.
    """
    return margin(log_probabilities(logits).exp(), labels)


def log_probabilities(logits: Tensor) -> Tensor:
    """The logarithm of the softmax of logits ``[n, K]``, as ``[n, K]`` in float32 or better."""
    return F.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q)`` of every example, in nats: ``[n, K]`` twice to ``[n]``.

    TRADES' inner problem maximises it, with ``p`` at the natural and ``q`` at the adversarial input (Zhang et al.,
    2019). Both sides are logarithms, so that a saturated network gives a finite value where ``0 · log 0`` gives NaN.

    Args:
        log_p: log-probabilities of ``p``.
        log_q: log-probabilities of ``q``.
    """
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
