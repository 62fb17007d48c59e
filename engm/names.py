"""Between which names can users choose, and what goes with each? Needs no torch, so that command lines know at once."""

from __future__ import annotations

BATCH_NORM_MODES = ("calibrated", "frozen", "exact")
"""How a :class:`engm.GradNormModule` takes norms through batch statistics."""

COUPLED_MODES = ("refuse", "exact")
"""What it does about examples that influence each other otherwise."""

OBJECTIVES = ("pgd", "trades", "mart", "fat", "ates", "backward-smoothing", "lbgat", "self-adaptive")
"""Methods that :func:`engm.adversarial.objective` knows; ``"vanilla"`` is another name of ``"pgd"``."""

NOT_SMOOTHED = {
    "mart": (
        "its boosted cross-entropy compares the label with the strongest other class, and its weights are of the "
        "label's own probability, which smoothed labels have not"
    ),
    "lbgat": "its robust network sees no label but the guide's prediction",
    "self-adaptive": "its labels are soft already, moved towards the network's own predictions",
}
"""Why methods take no label smoothing, for messages."""

BETAS = {"trades": 6.0, "mart": 6.0, "backward-smoothing": 10.0, "lbgat": 0.0, "self-adaptive": 6.0}
"""The weights of the KL terms as published, by method.

TRADES: ``train_trades_cifar10.py`` (yaodongyu/TRADES). MART: 6 as ever here; ``train_resnet.py`` of its authors has 5.
Backward smoothing: the command in its authors' README. LBGAT: 0 is the LBGAT0 that Table 4 of Dabouei et al. (2022)
quotes (88.22 and 52.86, README of dvlab-research/LBGAT); LBGAT6 has 6. Self-adaptive training: ``run_trades_sat.sh`` of
its authors.
"""
