"""Data of one's own: a function by its address that returns a data set of ours, or two or three of torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..addresses import call, load, short_name, takes
from .dataset import Dataset, check_labels
from .torch_sets import Placing, from_torch


def own_data(address: str, *, root: str | Path, download: bool, placing: Placing) -> Dataset:
    """Loads what the function at an address returns.

    Args:
        address: of a function that is called with no argument, or with ``root=``, ``download=`` and ``image_size=`` if
            it has parameters of these names. It returns a :class:`Dataset`, whose splits are taken as they are; or
            training and test examples, ``(train, test)``, of which the validation examples are held out; or
            ``(train, validation, test)``. These are data sets of ``(image, label)``, see
            :func:`engm.recipes.data.torch_sets.from_torch`.
        root: ``--data-root``.
        download: ``--download``.
        placing: how it is split, and where the images go.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such module or name, it cannot be called so, it fails, or it returns something else.
    """
    function = load(address, what="data", also=("torchvision", "timm", "hf"))
    options: dict[str, Any] = {"root": str(root), "download": download, "image_size": placing.image_size}
    found = call(function, address, {}, options)
    name = short_name(address)
    if isinstance(found, Dataset):
        placing.check_own_validation(address)
        if placing.image_size is not None and not takes(function, "image_size"):
            raise ValueError(f"image_size (--image-size): {address} has no parameter of this name, so leave it out")
        return _checked(found, address)
    if not (isinstance(found, tuple | list) and len(found) in (2, 3)):
        raise ValueError(
            f"{address} must return an engm.recipes.data.Dataset, or (train, test), or (train, validation, test), and "
            f"returned a {type(found).__name__}{f' of {len(found)}' if isinstance(found, tuple | list) else ''}"
        )
    train, test = found[0], found[-1]
    return from_torch(name, train, test, validation=found[1] if len(found) == 3 else None, placing=placing)


def _checked(dataset: Dataset, address: str) -> Dataset:
    """Looks whether the three splits fit each other and their number of classes."""
    for part in ("train", "validation", "test"):
        split = getattr(dataset, part)
        if not len(split):
            raise ValueError(f"{address}: the {part} split is empty")
        if split.shape != dataset.train.shape:
            raise ValueError(
                f"{address}: images of the train split are {list(dataset.train.shape)}, those of the {part} split "
                f"{list(split.shape)}"
            )
        check_labels(split.labels.cpu(), dataset.classes, f"{address}, {part} split")
    return dataset
