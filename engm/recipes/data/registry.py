"""Data by name or path."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engm.checks import check_name

from ..addresses import is_address
from ..data_names import DATASETS, known_data, names_source
from .by_source import load_by_source
from .dataset import Dataset, Split
from .digits import load_digits
from .image_folder import load_image_folder
from .memory import InMemory, keep_in_memory
from .npz import load_npz
from .own import own_data
from .streamed import StreamedSplit
from .tiny_imagenet import is_tiny_imagenet, load_tiny_imagenet
from .torch_sets import Placing
from .torchvision_sets import load_cifar10, load_cifar100, load_svhn

_TORCHVISION = {"cifar10": load_cifar10, "cifar100": load_cifar100, "svhn": load_svhn}


def load_data(
    spec: str | Path,
    *,
    root: str | Path = "data",
    download: bool = False,
    image_size: int | None = None,
    validation_examples: int | None = 1000,
    split_seed: int = 0,
    validation_from_test: bool = False,
    in_memory: InMemory = "auto",
    device: torch.device | str = "cpu",
    workers: int = 2,
) -> Dataset:
    """Loads a data set.

    Args:
        spec: one of :data:`DATASETS` (in any case, with ``-`` or ``_`` anywhere), the path of an ``.npz``
            (:func:`load_npz`), or that of a folder (:func:`load_image_folder`, or Tiny-ImageNet's own layout). Or what
            others know by name, ``torchvision:Name``, ``timm:name`` and ``hf:name`` (Hugging Face's), or data of one's
            own, ``package.module:function`` and ``file.py:function`` (:func:`~engm.recipes.data.own.own_data`).
        root: where named data sets lie.
        download: fetch it if it is missing: CIFAR, SVHN, and what other packages can fetch.
        image_size: side in pixels to which images are brought, of a folder, of other packages, or of one's own.
        validation_examples: how many training examples to hold out (the paper takes 1,000). The digits have a split of
            their own: for them this, ``split_seed`` and ``validation_from_test`` must be left alone. ``None`` if nobody
            will look at them: then it is one.
        split_seed: seed of the draw of those.
        validation_from_test: hold them out of the test set instead, the paper's other reading.
        in_memory: ``True`` for tensors of uint8; ``False`` for images that a ``DataLoader`` reads or hands over batch
            by batch; ``"auto"`` for tensors if they take at most half of the memory that is free, on the host (unless
            they are there anyway) and on ``device``.
        device: where it will be used; the data set itself is on the CPU until :meth:`Dataset.to`.
        workers: loader processes, if it is not in memory.

    Raises:
        ValueError: an unknown name (says which are nearest), an argument that this data set does not take or that is
            out of range, or files that are not as they should be.
        FileNotFoundError: no such file or folder, or a part of it is missing.
        ConnectionError: a download failed.
        ModuleNotFoundError: a package of ``engm[recipes]`` is not installed.
    """
    held_out: dict[str, Any] = {
        "validation_examples": 1 if validation_examples is None else validation_examples,
        "split_seed": split_seed,
        "validation_from_test": validation_from_test,
    }
    streaming: dict[str, Any] = {"in_memory": in_memory, "device": device, "workers": workers}
    name = known_data(str(spec))
    path = Path(spec).expanduser()
    folder = name is None and path.is_dir()
    if name is None and (names_source(str(spec)) or is_address(str(spec))) and not path.exists():
        placing = Placing(image_size, **{**held_out, "validation_examples": validation_examples}, **streaming)
        load = load_by_source if names_source(str(spec)) else own_data
        return _placed(load(str(spec), root=root, download=download, placing=placing), in_memory, device, workers)
    if image_size is not None and (not folder or is_tiny_imagenet(path)):
        raise ValueError(f"image_size (--image-size) is for folders of images and for data of others, not for {spec}")
    if name == "tiny-imagenet" or (folder and is_tiny_imagenet(path)):
        return load_tiny_imagenet(path if folder else root, **held_out, **streaming)
    if folder:
        return load_image_folder(path, image_size, **held_out, **streaming)
    if name == "digits":
        if validation_examples is not None and held_out != {
            "validation_examples": 1000,
            "split_seed": 0,
            "validation_from_test": False,
        }:
            raise ValueError(
                "digits have a fixed split of 640 training, 300 validation and 857 test images: leave "
                "validation_examples, split_seed and validation_from_test at their defaults"
            )
        dataset = load_digits()
    elif name is not None:
        dataset = _TORCHVISION[name](root, download=download, **held_out)
    else:
        _check_path(str(spec), path)
        dataset = load_npz(path, **held_out)
    return _placed(dataset, in_memory, device, workers)


def _check_path(spec: str, path: Path) -> None:
    """Refuses what is neither a name nor the path of an ``.npz``."""
    if path.suffix.lower() == ".npz":
        return
    if path.exists():
        raise ValueError(f"{path}: expected an .npz file or a folder of images")
    if os.sep in spec or spec.startswith((".", "~")) or path.suffix:
        raise FileNotFoundError(f"no data at {path}; expected an .npz file, a folder of images or a name")
    check_name(spec, DATASETS, what=f"data set, and neither a file nor a folder in {Path.cwd()}")


def _placed(dataset: Dataset, in_memory: InMemory, device: torch.device | str, workers: int) -> Dataset:
    """Splits that are on the host now, handed to the device batch by batch if it should not hold them."""
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    here = {name: split for name, split in splits.items() if isinstance(split, Split)}
    size = sum(split.inputs.nbytes for split in here.values())
    if keep_in_memory(in_memory, size, *([device] if torch.device(device).type != "cpu" else [])):
        return dataset
    streamed: dict[str, Any] = {
        name: StreamedSplit(split.inputs, split.labels, split.shape, workers=workers) for name, split in here.items()
    }
    return replace(dataset, **streamed)
