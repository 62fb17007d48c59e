"""What a loader returns: three splits of images, in memory or read as they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from .augment import Augmentation


class Source(Protocol):
    """Labelled images, wherever they lie: :class:`Split` or :class:`~engm.recipes.data.StreamedSplit`."""

    @property
    def labels(self) -> Tensor:
        """``[n]`` int64 class indices."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of an image."""

    def __len__(self) -> int: ...

    def batches(self, rows: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """``(inputs [n, C, H, W] float32 in [0, 1], labels [n])`` for each tensor of row indices, in that order."""

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """One batch."""

    def take(self, rows: Tensor) -> Self:
        """The examples at ``rows``, in that order."""

    def to(self, device: torch.device | str) -> Self:
        """The same examples, with batches on another device."""


AnySource = TypeVar("AnySource", bound=Source)


@dataclass(frozen=True)
class Split:
    """Labelled images in memory.

    Attributes:
        inputs: ``[n, C, H, W]``, uint8, or float32 in [0, 1].
        labels: ``[n]`` int64 class indices.

    Raises:
        ValueError: shapes or types are not these.
    """

    inputs: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.inputs.dim() != 4 or self.inputs.dtype not in (torch.uint8, torch.float32):
            raise ValueError(
                "inputs must be [n, C, H, W], uint8 or float32 in [0, 1], "
                f"got {self.inputs.dtype} {list(self.inputs.shape)}"
            )
        if self.labels.shape != self.inputs.shape[:1] or self.labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be int64 [{len(self.inputs)}], one for each image, "
                f"got {self.labels.dtype} {list(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of an image."""
        channels, height, width = self.inputs.shape[1:]
        return channels, height, width

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The examples at ``rows`` as float32 inputs in [0, 1] and labels, on the split's device."""
        rows = rows.to(self.labels.device)
        return as_float(self.inputs[rows]), self.labels[rows]

    def batches(self, rows: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """One :meth:`batch` for each tensor of row indices."""
        return map(self.batch, rows)

    def take(self, rows: Tensor) -> Split:
        """The examples at ``rows``, in that order, stored alike."""
        rows = rows.to(self.labels.device)
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
        augment: what suits the training images.
        extra: more training examples, of which a run takes a share of every batch, if it has any.
    """

    name: str
    classes: int
    train: Source
    validation: Source
    test: Source
    augment: Augmentation = field(default_factory=Augmentation)
    extra: Source | None = None

    def to(self, device: torch.device | str) -> Dataset:
        """All splits on another device."""
        train, validation, test = (split.to(device) for split in (self.train, self.validation, self.test))
        extra = None if self.extra is None else self.extra.to(device)
        return replace(self, train=train, validation=validation, test=test, extra=extra)


def as_float(images: Tensor) -> Tensor:
    """Images as networks take them, float32 in [0, 1]: uint8 are divided by 255, others are in [0, 1] already."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def shuffled_rows(count: int, seed: int) -> Tensor:
    """A permutation of ``range(count)`` that depends on ``seed`` alone, not on the global random state."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def hold_out(
    train: AnySource, test: AnySource, *, validation_examples: int, split_seed: int, validation_from_test: bool
) -> tuple[AnySource, AnySource, AnySource]:
    """Makes three splits of two.

    Args:
        train: all training examples.
        test: all test examples.
        validation_examples: how many to hold out.
        split_seed: seed of the draw of those.
        validation_from_test: draw them from ``test``, which then has as many fewer, in its old order.

    Returns:
        Training examples in a drawn order (so that the first so many are a fair sample), validation and test examples.

    Raises:
        ValueError: not as many examples as that.
    """
    source, kind = (test, "test") if validation_from_test else (train, "training")
    if not 0 < validation_examples < len(source):
        raise ValueError(
            f"--validation-examples must be between 1 and {len(source) - 1} "
            f"(there are {len(source)} {kind} examples), got {validation_examples}; a tenth of them are "
            f"--validation-examples {max(1, len(source) // 10)}"
        )
    rows = shuffled_rows(len(source), split_seed)
    held, left = rows[:validation_examples], rows[validation_examples:]
    if validation_from_test:
        return train.take(shuffled_rows(len(train), split_seed)), test.take(held), test.take(left.sort().values)
    return train.take(left), train.take(held), test


def check_labels(labels: Tensor, classes: int, path: Path | str) -> None:
    """Refuses labels outside of ``0 .. classes - 1``.

    Args:
        labels: ``[n]`` int64.
        classes: how many there should be.
        path: the file, folder or data set that they come from, for the message.

    Raises:
        ValueError: the first wrong one.
    """
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{path}: labels must be class indices from 0 to {classes - 1}; "
            f"{len(wrong)} of {len(labels)} are not, the first {int(labels[row])} at row {row}"
        )
