"""What changes in the course of a run: learning rate, radius and stopping of the attack, soft labels, AWP's warm-up.

Each of these is a function of the position alone, so a resumed run needs no state for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi

from ..config import RunConfig

# Zhang et al. (2020) let FAT take 0, 1 and 2 more steps from epochs 0, 50 and 90 of 120 on.
FAT_PATIENCE_FROM = (50 / 120, 90 / 120)
# ATES' gap rises from epoch 30 to epoch 70 of 100: linear_gap in train_cifar.yml of chawins/adv-exp (commit e5d817a).
GAP_RISES = (30 / 100, 70 / 100)
# Labels move from epoch 70 of 100 on in run_trades_sat.sh of Huang et al. (2020), counted from 1.
LABELS_MOVE_FROM = 70 / 100


# torch.optim.lr_scheduler.OneCycleLR's: the share of the steps that rise, and by what lr is divided first and at last.
_RISING, _FIRST, _LAST = 0.3, 25, 25 * 1e4
# The share of the steps that a triangle rises for (Wong et al., 2020; Rice et al., 2020).
_PEAK = 0.4


def _triangle(step: int, whole: int) -> float:
    share = step / whole
    return share / _PEAK if share <= _PEAK else (1 - share) / (1 - _PEAK)


def _one_cycle(step: int, whole: int) -> float:
    peak, last = _RISING * whole - 1, whole - 1
    if step <= peak:
        return _between(1 / _FIRST, 1.0, step / peak if peak else 1.0)
    return _between(1.0, 1 / _LAST, min((step - peak) / (last - peak), 1.0))


def _between(start: float, end: float, share: float) -> float:
    """A half period of a cosine that goes from ``start`` to ``end``."""
    return end + (start - end) * (1 + cos(pi * share)) / 2


# The part of --lr that a step of so many takes, counted from 0.
_SHAPES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda step, whole: 1.0,
    "linear": lambda step, whole: 1 - step / whole,
    "cosine": lambda step, whole: _between(1.0, 0.0, step / whole),
    "cyclic": _triangle,
    "one-cycle": _one_cycle,
}


@dataclass(frozen=True)
class Schedule:
    """The schedule of a resolved configuration.

    Attributes:
        config: the configuration, resolved.
        steps_per_epoch: batches an epoch.
    """

    config: RunConfig
    steps_per_epoch: int

    @property
    def planned(self) -> int:
        """Epochs that everything is planned for which depends on how many there are."""
        return self.config.schedule_epochs or self.config.epochs

    def lr(self, epoch: int, batch: int = 0) -> float:
        """The learning rate of a step, by its epoch and its number in there, both counted from 0.

        While ``warmup`` lasts it grows linearly to what it would be; falling schedules begin after it.
        """
        warm = round(self.config.warmup * self.steps_per_epoch)
        step = epoch * self.steps_per_epoch + batch
        if self.config.schedule == "steps":
            passed = sum(epoch >= decay for decay in self.config.decay_epochs or ())
            lr = self.config.lr * 0.1**passed
        else:
            whole = max(self.planned * self.steps_per_epoch - warm, 1)
            lr = self.config.lr * _SHAPES[self.config.schedule](min(max(step - warm, 0), whole), whole)
        return lr * (step + 1) / warm if step < warm else lr

    def eps(self, step: int) -> float:
        """The radius of the attack at a step of the run, counted from 0; it grows linearly over ``eps_warmup``."""
        full = self.config.eps or 0.0
        ramp = self.config.eps_warmup * self.steps_per_epoch
        return full if step >= ramp else full * step / ramp

    def patience(self, epoch: int) -> int:
        """Steps that FAT's attack goes on after an example is misclassified."""
        if self.config.patience is not None:
            return self.config.patience
        return sum(epoch >= share * self.planned for share in FAT_PATIENCE_FROM)

    def gap(self, epoch: int) -> float:
        """The difference of probabilities at which ATES' attack stops in an epoch.

        It rises before every epoch, in equal parts, as ``linear_gap`` of the authors' code does.
        """
        config = self.config
        first, last = config.gap_epochs or (round(share * self.planned) for share in GAP_RISES)
        share = min(max(epoch + 1 - first, 0) / max(last - first, 1), 1.0)
        return config.gap_first + (config.gap_last - config.gap_first) * share

    def labels_move(self, epoch: int) -> bool:
        """Whether the labels of self-adaptive training follow the predictions in an epoch."""
        start = self.config.sat_start or max(1, round(LABELS_MOVE_FROM * self.planned))
        return epoch + 1 >= start

    def awp(self, epoch: int) -> bool:
        """Whether weights are perturbed in an epoch."""
        return self.config.awp and epoch >= self.config.awp_warmup
