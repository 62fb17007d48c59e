"""Common corruptions in the layout of CIFAR-10-C (Hendrycks and Dietterich, 2019): five severities of every image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..accuracy import evaluate
from ..data import Split
from ..data.dataset import check_labels
from .attacks import Tell

SEVERITIES = 5
LABELS = "labels.npy"
EXTRA = ("gaussian_blur", "saturate", "spatter", "speckle_noise")
"""Corruptions that are there to tune on; the mean is over the others, as published."""


@dataclass(frozen=True)
class Corruption:
    """The images of one corruption.

    Attributes:
        name: of the corruption.
        images: ``[5 n, H, W, C]`` uint8, the severities one after the other; may lie on the disk.
        labels: ``[5 n]`` int64.
        examples: the first so many images of every severity are looked at.
    """

    name: str
    images: npt.NDArray[np.uint8]
    labels: torch.Tensor
    examples: int

    @property
    def identity(self) -> str:
        """Sixteen digits that differ if an image or a label that is looked at does."""
        digest = hashlib.sha256()
        for severity in range(SEVERITIES):
            images, labels = self._part(severity)
            digest.update(np.ascontiguousarray(images).tobytes())
            digest.update(labels.numpy().tobytes())
        return digest.hexdigest()[:16]

    def accuracies(self, net: nn.Module, batch_size: int, device: torch.device, tell: Tell) -> dict[str, Any]:
        """``severities``, the accuracy of each, and ``accuracy``, their mean."""
        found = []
        for severity in range(SEVERITIES):
            tell(severity, SEVERITIES, ", severities")
            images, labels = self._part(severity)
            split = Split(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous(), labels)
            found.append(evaluate(net, split.to(device), batch_size=batch_size).natural)
        return {"accuracy": mean(found), "severities": found}

    def _part(self, severity: int) -> tuple[npt.NDArray[np.uint8], torch.Tensor]:
        begin = severity * (len(self.labels) // SEVERITIES)
        rows = slice(begin, begin + self.examples)
        return self.images[rows], self.labels[rows]


def load_corruptions(folder: Path, shape: tuple[int, int, int], classes: int, examples: int | None) -> list[Corruption]:
    """The corruptions in a folder, by name.

    Args:
        folder: holds ``NAME.npy``, ``[5 n, H, W, C]`` uint8, for each corruption, and ``labels.npy``, ``[5 n]``.
        shape: ``(C, H, W)`` of the images that the network takes.
        classes: number of classes.
        examples: the first so many images of every severity; None: all.

    Raises:
        FileNotFoundError: no such folder, no labels, or no corruption.
        ValueError: a file is not as above, or there are not so many examples.
    """
    if not (folder / LABELS).is_file():
        raise FileNotFoundError(
            f"{folder / LABELS}: missing; expected a folder as CIFAR-10-C's, with NAME.npy [5 n, H, W, C] uint8 for "
            f"each corruption, five severities in order, and {LABELS} [5 n]"
        )
    labels = _read(folder / LABELS)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) % SEVERITIES or not len(labels):
        raise ValueError(
            f"{folder / LABELS}: expected integers [5 n], for five severities of n images, got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    targets = torch.from_numpy(labels.astype(np.int64))
    check_labels(targets, classes, folder / LABELS)
    each = len(labels) // SEVERITIES
    if examples is not None and not 1 <= examples <= each:
        raise ValueError(
            f"examples must lie between 1 and {each}, the images of a severity in {folder}; got {examples}"
        )
    channels, height, width = shape
    found = []
    for path in sorted(folder.glob("*.npy")):
        if path.name == LABELS:
            continue
        images = _read(path)
        expected = (len(labels), height, width, channels)
        if images.dtype != np.uint8 or images.shape != expected:
            raise ValueError(f"{path}: expected uint8 {list(expected)}, got {images.dtype} {list(images.shape)}")
        found.append(Corruption(path.stem, images, targets, each if examples is None else examples))
    if not found:
        raise FileNotFoundError(f"no corruption in {folder}: expected NAME.npy beside {LABELS}")
    return found


def mean_accuracy(accuracies: dict[str, float]) -> float:
    """The mean over corruptions, without :data:`EXTRA` where there are others."""
    counted = [value for name, value in accuracies.items() if name not in left_out(accuracies)]
    return mean(counted)


def left_out(names: Iterable[str]) -> list[str]:
    """Those of :data:`EXTRA` that are there, where there are others to take the mean of."""
    there = list(names)
    return [name for name in EXTRA if name in there] if set(there) - set(EXTRA) else []


def _read(path: Path) -> npt.NDArray[Any]:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not an array of numpy's: {error}") from error
