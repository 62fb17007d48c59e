"""What a loader returns: three splits of tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Labelled images.

    Attributes:
        inputs: ``[n, C, H, W]`` float32 in [0, 1].
        labels: ``[n]`` int64 class indices.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Split:
        """The examples at ``rows`` (indices or a slice of them), in that order."""
        return Split(self.inputs[rows], self.labels[rows])

    def to(self, device: torch.device | str) -> Split:
        """The same examples on another device."""
        return Split(self.inputs.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Training, validation and test examples; the last are for the final report only.

    Attributes:
        name: as reports print it.
        classes: number of classes.
    """

    name: str
    classes: int
    train: Split
    validation: Split
    test: Split

    def to(self, device: torch.device | str) -> Dataset:
        """All three splits on another device."""
        return Dataset(self.name, self.classes, self.train.to(device), self.validation.to(device), self.test.to(device))


def shuffled_rows(count: int, seed: int) -> Tensor:
    """A permutation of ``range(count)`` that depends on ``seed`` alone, not on the global random state."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
