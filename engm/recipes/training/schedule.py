"""What changes in the course of a run: learning rate, radius of the attack, FAT's patience, AWP's warm-up.

Each of these is a function of the position alone, so a resumed run needs no state for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import RunConfig

# Zhang et al. (2020) let FAT take 0, 1 and 2 more steps from epochs 0, 50 and 90 of 120 on.
FAT_PATIENCE_FROM = (50 / 120, 90 / 120)


@dataclass(frozen=True)
class Schedule:
    """The schedule of a resolved configuration.

    Attributes:
        config: the configuration, resolved.
        steps_per_epoch: batches an epoch.
    """

    config: RunConfig
    steps_per_epoch: int

    def lr(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        passed = sum(epoch >= decay for decay in self.config.decay_epochs or ())
        return self.config.lr * 0.1**passed

    def eps(self, step: int) -> float:
        """The radius of the attack at a step of the run, counted from 0; it grows linearly over ``eps_warmup``."""
        full = self.config.eps or 0.0
        ramp = self.config.eps_warmup * self.steps_per_epoch
        return full if step >= ramp else full * step / ramp

    def patience(self, epoch: int) -> int:
        """Steps that FAT's attack goes on after an example is misclassified."""
        if self.config.patience is not None:
            return self.config.patience
        return sum(epoch >= share * self.config.epochs for share in FAT_PATIENCE_FROM)

    def awp(self, epoch: int) -> bool:
        """Whether weights are perturbed in an epoch."""
        return self.config.awp and epoch >= self.config.awp_warmup
