"""The batches of a training run, as a function of seed and position: a resumed run meets the very same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..data import Augmentation, Source
from ..processes import Processes


def seed_for(*parts: object) -> int:
    """A seed for one purpose of one run: ``seed_for("order", seed, epoch)``; unrelated for any other parts."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


class TrainingBatches:
    """Shuffled, augmented batches; an incomplete last one is left out.

    The order depends on seed and epoch, the augmentation on seed, epoch and number of the batch. Nothing is remembered
    from one batch to the next, so there is no state to save. Several processes draw alike and take their own rows.

    Args:
        source: the training examples.
        batch_size: examples a batch, of all processes together.
        augmentation: applied to every batch.
        seed: seed of the run.
        processes: the processes that share the batches.
        memory_format: memory format of the images.

    Raises:
        ValueError: fewer examples than one batch, or a batch that the processes cannot share evenly.

    Attributes:
        steps: batches an epoch.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        augmentation: Augmentation,
        seed: int,
        processes: Processes,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        if len(source) < batch_size:
            raise ValueError(f"{len(source)} training examples are less than one batch of {batch_size}")
        self._rows = processes.rows(batch_size)
        self._source = source
        self._batch_size = batch_size
        self._augmentation = augmentation
        self._seed = seed
        self._device = processes.device
        self._memory_format = memory_format
        self.steps = len(source) // batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the batches of an epoch (counted from 0), from number ``start`` on.

        Yields:
            ``(inputs [n, C, H, W] float32 in [0, 1], labels [n])`` on the device.
        """
        generator = torch.Generator().manual_seed(seed_for("order", self._seed, epoch))
        order = torch.randperm(len(self._source), generator=generator)[: self.steps * self._batch_size]
        rows = [batch[self._rows] for batch in order.split(self._batch_size)[start:]]
        for number, (x, y) in enumerate(self._source.batches(rows), start=start):
            x, y = x.to(self._device, non_blocking=True), y.to(self._device, non_blocking=True)
            generator.manual_seed(seed_for("augmentation", self._seed, epoch, number))
            draw = self._augmentation.draw(self._batch_size, generator).take(self._rows)
            yield self._augmentation.apply(x, draw).contiguous(memory_format=self._memory_format), y
