"""What a look at the validation set comes to: figures by name, and the best of all looks so far."""

from __future__ import annotations

from dataclasses import dataclass

from ..accuracy import Accuracy


@dataclass
class Best:
    """The best look at the validation set so far.

    Attributes:
        epoch: number of finished epochs.
        steps: steps that the run had taken by then.
        accuracy: on the validation set.
    """

    epoch: int
    steps: int
    accuracy: Accuracy

    @property
    def score(self) -> float:
        """What the checkpoint was chosen by; see :func:`robust_of`."""
        return robust_of(self.accuracy)


def robust_of(accuracy: Accuracy) -> float:
    """What checkpoints are chosen by: accuracy under the evaluation attack (natural accuracy if there is none)."""
    return accuracy.natural if accuracy.robust is None else accuracy.robust


def figures_of(accuracy: Accuracy | None, prefix: str = "") -> dict[str, float | None]:
    """Accuracies by the names that logs use, where there are any."""
    natural, robust = (None, None) if accuracy is None else (accuracy.natural, accuracy.robust)
    return {f"{prefix}natural": natural, f"{prefix}robust": robust}
