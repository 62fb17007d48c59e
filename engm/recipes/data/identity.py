"""Are these the images that a run was trained on? Told by what they are: names stay when files change."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from .dataset import Dataset, Source

LOOKED_AT = 128  # images of a split, because those of a folder have to be read and decoded for it
SPLITS = {"train": "training", "validation": "validation", "test": "test", "extra": "extra"}


def identity(source: Source) -> str:
    """Sixteen digits that differ if the number, the shape, a label or one of the images looked at does.

    All labels count, and up to 128 images, evenly spaced, with pixels as bytes. The digits are the same wherever the
    images lie: in memory, on a GPU or in files.

    Args:
        source: at least one example.
    """
    rows = torch.arange(len(source))
    if len(source) > LOOKED_AT:
        rows = torch.linspace(0, len(source) - 1, LOOKED_AT, dtype=torch.float64).round().long()
    images, _ = source.batch(rows)
    digest = hashlib.sha256(repr((len(source), source.shape)).encode())
    for tensor in (source.labels, images.mul(255).round().byte()):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def identities(dataset: Dataset) -> dict[str, str]:
    """The :func:`identity` of each split that there is by its name."""
    splits = {name: getattr(dataset, name) for name in SPLITS}
    return {name: identity(split) for name, split in splits.items() if split is not None}


def check_same_data(known: Mapping[str, str], found: Mapping[str, str], name: str) -> None:
    """Refuses other data than a run was trained on.

    Args:
        known: :func:`identities` of the data that the run was trained on.
        found: those of the data that there are now; of extra data only where they are about to be trained on.
        name: name of the data set.

    Raises:
        ValueError: they differ; names the splits.
    """
    other = [shown for split, shown in SPLITS.items() if known.get(split) != found.get(split, known.get(split))]
    if other:
        raise ValueError(
            f"the {' and '.join(other)} images of {name} are not those that this run was trained on: bring "
            "the old data back, or begin another run in another --out"
        )
