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

    Where there are extra examples, every batch has the same number of them, evenly spread over its rows, so that each
    process has its share. An epoch has as many batches as without them. The original examples of an epoch are then a
    part of all, drawn anew for every epoch, and so are the extra ones; where these are few, they come several times.

    Args:
        source: the training examples.
        batch_size: examples a batch, of all processes together.
        augmentation: applied to every batch.
        seed: seed of the run.
        processes: the processes that share the batches.
        memory_format: memory format of the images.
        extra: more examples.
        extra_fraction: the share of a batch that they are, in (0, 1).

    Raises:
        ValueError: fewer examples than one batch, a batch that the processes cannot share evenly, or a fraction that
            leaves a process's part of a batch without original or extra examples.

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
        *,
        extra: Source | None = None,
        extra_fraction: float = 0.0,
    ) -> None:
        if len(source) < batch_size:
            raise ValueError(f"{len(source)} training examples are less than one batch of {batch_size}")
        self._rows = processes.rows(batch_size)
        self._extra = extra
        self._is_extra = _spread(batch_size, 0 if extra is None else round(extra_fraction * batch_size))
        mine = self._is_extra[self._rows]
        if extra is not None and (bool(mine.all()) or not bool(mine.any())):
            raise ValueError(
                f"--extra-fraction {extra_fraction:g} of {len(mine)} examples a process leaves no original or no extra "
                "ones: choose another fraction or a larger --batch-size"
            )
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
        generator = torch.Generator()
        for number, (x, y) in enumerate(self._examples(epoch, start), start=start):
            generator.manual_seed(seed_for("augmentation", self._seed, epoch, number))
            draw = self._augmentation.draw(self._batch_size, generator).take(self._rows)
            yield self._augmentation.apply(x, draw).contiguous(memory_format=self._memory_format), y

    def rows(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """Where the examples of :meth:`epoch` are in the training set, extra ones behind it: ``[n]`` on the device."""
        own = self._drawn("order", epoch, start, len(self._source), ~self._is_extra)
        if self._extra is None:
            yield from map(self._here, own)
            return
        more = self._drawn("extra", epoch, start, len(self._extra), self._is_extra)
        for mine, others in zip(own, more, strict=True):
            yield self._here(torch.cat([mine, others + len(self._source)])[self._order])

    def _examples(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the batches, as they are, on the device."""
        own = self._source.batches(self._drawn("order", epoch, start, len(self._source), ~self._is_extra))
        if self._extra is None:
            yield from ((self._here(x), self._here(y)) for x, y in own)
            return
        more = self._extra.batches(self._drawn("extra", epoch, start, len(self._extra), self._is_extra))
        order = self._here(self._order)
        for parts in zip(own, more, strict=True):
            x, y = (torch.cat([self._here(part) for part in both])[order] for both in zip(*parts, strict=True))
            yield x, y

    @property
    def _order(self) -> Tensor:
        """Where each row of this process's batch lies when the extra examples stand behind the others."""
        mine = self._is_extra[self._rows]
        return torch.cat([(~mine).nonzero(), mine.nonzero()]).squeeze(1).argsort()

    def _drawn(self, what: str, epoch: int, start: int, length: int, mask: Tensor) -> list[Tensor]:
        """The rows, of so many, that this process takes in every batch for the places where ``mask`` holds."""
        generator = torch.Generator().manual_seed(seed_for(what, self._seed, epoch))
        count = int(mask.sum())
        rounds = -(-self.steps * count // length)
        order = torch.cat([torch.randperm(length, generator=generator) for _ in range(rounds)])
        first = int(mask[: self._rows.start].sum())
        mine = slice(first, first + int(mask[self._rows].sum()))
        return [batch[mine] for batch in order[: self.steps * count].split(count)[start:]]

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


def _spread(count: int, marked: int) -> Tensor:
    """``[count]`` bool, of which ``marked`` are true, as evenly as can be."""
    places = torch.arange(count + 1) * marked // count
    return places[1:] > places[:-1]
