"""Extra or generated training examples, which every batch has a share of (Gowal et al., 2021; Rebuffi et al., 2021)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from .dataset import Dataset, check_labels
from .memory import InMemory, keep_in_memory
from .npz import read_arrays, split_of
from .streamed import StreamedSplit

# The names of images and labels: in the files of generated images that these authors and others give away, and in ours.
_NAMES = (("image", "label"), ("x_train", "y_train"))


def with_extra(
    dataset: Dataset, path: str | Path, *, in_memory: InMemory, device: torch.device, workers: int
) -> Dataset:
    """The data set with the examples of a file as ``extra``.

    Args:
        dataset: the original data.
        path: an ``.npz`` with ``image [N, H, W, C] uint8`` and ``label [N]``, or ``x_train`` and ``y_train``. What the
            labels are worth (true ones, or a network's guesses) nobody looks at.
        in_memory: as :func:`engm.recipes.data.load_data` takes it.
        device: where batches go.
        workers: loader processes, if it is not in memory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else, or images or classes that the data set has not.
    """
    path = Path(path)
    arrays = read_arrays(path, *_NAMES)
    (image, images), (label, labels) = arrays.items()
    split = split_of(images, labels, (image, label), path)
    if split.shape != dataset.train.shape:
        raise ValueError(
            f"{path}: extra images are of shape {list(split.shape)} (as [C, H, W]), and those of {dataset.name} of "
            f"{list(dataset.train.shape)}"
        )
    check_labels(split.labels, dataset.classes, path)
    if keep_in_memory(in_memory, split.inputs.nbytes, *([device] if device.type != "cpu" else [])):
        return replace(dataset, extra=split.to(device))
    return replace(
        dataset, extra=StreamedSplit(split.inputs, split.labels, split.shape, device=device, workers=workers)
    )
