"""CIFAR-10, CIFAR-100 and SVHN, through torchvision."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..storage.atomic_files import explained, make_folder
from .augment import CROP_AND_FLIP
from .dataset import Dataset, Split, check_labels, hold_out
from .extras import import_extra

_PURPOSE = "CIFAR and SVHN"
# Where the files can be read about and fetched by hand.
ADDRESSES = {
    "CIFAR10": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "CIFAR100": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "SVHN": "http://ufldl.stanford.edu/housenumbers/",
}
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)  # faults of the disk, not of the network


def load_cifar10(
    root: str | Path,
    *,
    download: bool = False,
    validation_examples: int = 1000,
    split_seed: int = 0,
    validation_from_test: bool = False,
) -> Dataset:
    """CIFAR-10 (Krizhevsky, 2009): 50,000 and 10,000 images ``[3, 32, 32]`` of 10 classes, from its pickled batches.

    Args:
        root: the folder that holds ``cifar-10-batches-py``.
        download: fetch what is missing or damaged. Files appear in ``root`` when all of them are there.
        validation_examples: how many training examples to hold out.
        split_seed: seed of the draw of those.
        validation_from_test: hold them out of the test set instead.

    Returns:
        The dataset, uint8, on the CPU.

    Raises:
        FileNotFoundError: a file is missing or damaged (all are checked by MD5), and ``download`` is false.
        ConnectionError: the download failed; ``root`` is as it was.
        OSError: ``root`` cannot be written.
        ValueError: ``validation_examples`` out of range.
        ModuleNotFoundError: torchvision is not installed.
    """
    return _load_cifar("CIFAR10", 10, root, download, validation_examples, split_seed, validation_from_test)


def load_cifar100(
    root: str | Path,
    *,
    download: bool = False,
    validation_examples: int = 1000,
    split_seed: int = 0,
    validation_from_test: bool = False,
) -> Dataset:
    """CIFAR-100: as :func:`load_cifar10`, in ``root/cifar-100-python``, with its 100 fine classes, as the paper has it.

    Its 20 coarse classes are of no use here.
    """
    return _load_cifar("CIFAR100", 100, root, download, validation_examples, split_seed, validation_from_test)


def load_svhn(
    root: str | Path,
    *,
    download: bool = False,
    validation_examples: int = 1000,
    split_seed: int = 0,
    validation_from_test: bool = False,
) -> Dataset:
    """SVHN (Netzer et al., 2011): 73,257 and 26,032 images ``[3, 32, 32]`` of the digits 0 to 9, without ``extra``.

    Args:
        root: the folder that holds ``train_32x32.mat`` and ``test_32x32.mat``.
        download: as :func:`load_cifar10` takes it, and so are the others.
        validation_examples: number of training examples to hold out.
        split_seed: seed of the draw of those.
        validation_from_test: hold them out of the test set instead.
    """
    kind = import_extra("torchvision.datasets", _PURPOSE).SVHN
    import_extra("scipy.io", "the files of SVHN")  # torchvision asks for it too late to say which package lacks it

    def fetch(folder: str) -> None:
        for part in ("train", "test"):
            kind(folder, split=part, download=True)

    root = Path(root)
    files = tuple(_File(name, md5) for _, name, md5 in (kind.split_list[part] for part in ("train", "test")))
    _provide("SVHN", root, files, download, fetch)
    splits = []
    for file, part in zip(files, ("train", "test"), strict=True):
        raw = kind(str(root), split=part)
        splits.append(_split(raw.data, raw.labels, 10, root / file.name))
    return _dataset("svhn", 10, splits, validation_examples, split_seed, validation_from_test)


@dataclass(frozen=True)
class _File:
    """A file below the root, and what it must hold."""

    name: str
    md5: str


def _load_cifar(
    kind: str,
    classes: int,
    root: str | Path,
    download: bool,
    validation_examples: int,
    split_seed: int,
    validation_from_test: bool,
) -> Dataset:
    cifar: Any = getattr(import_extra("torchvision.datasets", _PURPOSE), kind)
    root = Path(root)
    listed = [*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])]
    files = tuple(_File(f"{cifar.base_folder}/{name}", md5) for name, md5 in listed)
    _provide(kind, root, files, download, lambda folder: cifar(folder, download=True))
    splits = []
    for part in ("train", "test"):
        raw = cifar(str(root), train=part == "train")
        splits.append(_split(raw.data.transpose(0, 3, 1, 2), np.asarray(raw.targets), classes, root / files[0].name))
    return _dataset(kind.lower(), classes, splits, validation_examples, split_seed, validation_from_test)


def _split(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.integer], classes: int, path: Path) -> Split:
    """A split of images ``[n, 3, H, W]``, however they lie in memory."""
    targets = torch.from_numpy(labels.astype(np.int64))
    check_labels(targets, classes, path)
    return Split(torch.from_numpy(np.ascontiguousarray(images)), targets)


def _dataset(
    name: str, classes: int, splits: list[Split], validation_examples: int, split_seed: int, validation_from_test: bool
) -> Dataset:
    train, test = splits
    parts = hold_out(
        train,
        test,
        validation_examples=validation_examples,
        split_seed=split_seed,
        validation_from_test=validation_from_test,
    )
    return Dataset(name, classes, *parts, CROP_AND_FLIP)


def _provide(title: str, root: Path, files: tuple[_File, ...], download: bool, fetch: Callable[[str], object]) -> None:
    """Sees to it that all files are there and whole."""
    intact: Callable[[str, str], bool] = import_extra("torchvision.datasets.utils", _PURPOSE).check_integrity
    wrong = [file.name for file in files if not intact(str(root / file.name), file.md5)]
    if not wrong:
        return
    if not download:
        raise FileNotFoundError(
            f"{title}: missing or damaged in {root}: {', '.join(wrong)}; fetch it with --download (download=True), "
            f"or put these files there, which are at {ADDRESSES[title]}"
        )
    try:
        make_folder(root)
        with TemporaryDirectory(prefix=".downloading-", dir=root) as folder:
            fetch(folder)
            for file in files:
                (root / file.name).parent.mkdir(exist_ok=True)
                os.replace(Path(folder, file.name), root / file.name)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: what came has not the right checksum
        if isinstance(error, OSError) and error.errno in _LOCAL:
            with explained(root):
                raise
        raise ConnectionError(
            f"{title} could not be downloaded ({error}); {root} is as it was: "
            f"look at the network and run it again, or put {', '.join(file.name for file in files)} there, "
            f"which are at {ADDRESSES[title]}"
        ) from error
