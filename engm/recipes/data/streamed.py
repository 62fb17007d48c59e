"""Images that do not fit in memory: read batch by batch, by loader processes, in an order that the caller gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ..addresses import failure_of_own_code
from .dataset import Split, as_float

T = TypeVar("T")
R = TypeVar("R")
_BLOCK = 4096  # tasks that a thread pool is given at a time


class Images(Protocol):
    """A map-style data set of images without labels; a tensor ``[n, C, H, W]`` is one."""

    def __getitem__(self, index: int, /) -> Tensor:
        """``[C, H, W]``, uint8, or float32 in [0, 1]."""


class StreamedSplit:
    """Labelled images that are read when a batch of them is asked for; otherwise like :class:`Split`.

    Every call of :meth:`batches` starts its own loader processes. The order is the caller's and no random state is
    touched, so reading can begin anywhere. Batches travel through shared memory: where a container has little of it,
    use ``workers=0``.

    Args:
        images: read by index, each image of the given shape; must not use CUDA.
        labels: ``[n]`` int64 class indices, one for each image.
        shape: ``(C, H, W)`` of every image.
        device: where batches go.
        workers: loader processes; 0 to read in this one.

    Attributes:
        labels: ``[n]`` int64 class indices, on the CPU.
        shape: ``(C, H, W)`` of an image.
    """

    def __init__(
        self,
        images: Images,
        labels: Tensor,
        shape: tuple[int, int, int],
        *,
        device: torch.device | str = "cpu",
        workers: int = 2,
    ) -> None:
        self.labels = labels
        self.shape = shape
        self._images = images
        self._rows = torch.arange(len(labels))
        self._device = torch.device(device)
        self._workers = workers

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The examples at ``rows``, read in this process: float32 inputs in [0, 1] and labels, on the device."""
        rows = rows.cpu()
        images = default_collate([self._images[index] for index in self._rows[rows].tolist()])
        return self._on_device(images, rows)

    def image(self, row: int) -> Tensor:
        """The image at ``row`` as it is stored, ``[C, H, W]``, read in this process."""
        return self._images[int(self._rows[row])]

    def batches(self, rows: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """One batch for each tensor of row indices, read ahead by the loader processes.

        Raises:
            ValueError, OSError: an image cannot be read.
        """
        rows = [part.cpu() for part in rows]
        loader: DataLoader[Any] = DataLoader(
            _Guarded(self._images),  # type: ignore[arg-type]  # __getitems__ is all that is called
            batch_sampler=[self._rows[part].tolist() for part in rows],
            collate_fn=_as_is,
            num_workers=min(self._workers, len(rows)),
            pin_memory=self._device.type == "cuda",
            # Its own, as otherwise every iteration takes a number from the global one, which a resumed run would miss.
            generator=torch.Generator(),
        )
        for images, part in zip(loader, rows, strict=True):
            if isinstance(images, Exception):
                raise images
            yield self._on_device(images, part)

    def take(self, rows: Tensor) -> StreamedSplit:
        """The examples at ``rows``, in that order; nothing is read."""
        rows = rows.cpu()
        return self._with(self.labels[rows], self._rows[rows], self._device)

    def to(self, device: torch.device | str) -> StreamedSplit:
        """The same examples, with batches on another device."""
        return self._with(self.labels, self._rows, torch.device(device))

    def in_memory(self) -> Split:
        """The same examples, all of them read, by threads, into the host's memory."""
        rows = self._rows.tolist()
        first = self._images[rows[0]]
        inputs = first.new_empty((len(rows), *self.shape))

        def read(place: int) -> None:
            inputs[place] = self._images[rows[place]]

        for _ in in_threads(read, range(len(rows))):
            pass
        return Split(inputs, self.labels)

    def _with(self, labels: Tensor, rows: Tensor, device: torch.device) -> StreamedSplit:
        other = StreamedSplit(self._images, labels, self.shape, device=device, workers=self._workers)
        other._rows = rows
        return other

    def _on_device(self, images: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        labels = self.labels[rows]
        return as_float(images.to(self._device, non_blocking=True)), labels.to(self._device, non_blocking=True)


class _Guarded:
    """Whole batches for a ``DataLoader``.

    What is wrong with a file, or in a data set of the user's own, comes back as a value: raised in a loader process it
    would reach the user with that process's traceback for a message.
    """

    def __init__(self, images: Images) -> None:
        self._images = images

    def __getitems__(self, rows: list[int]) -> Tensor | Exception:
        try:
            return default_collate([self._images[row] for row in rows])
        except Exception as error:
            own = failure_of_own_code(error)
            if own is not None:
                return ValueError(own)
            if isinstance(error, ValueError | OSError):
                return error
            raise


def _as_is(batch: T) -> T:
    return batch


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """``map(function, items)`` by a pool of threads, in order; the first exception ends it."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(items), _BLOCK):
            yield from pool.map(function, items[start : start + _BLOCK])
