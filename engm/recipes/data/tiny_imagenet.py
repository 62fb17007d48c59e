"""Tiny-ImageNet: 200 classes of 500 training and 50 validation images of 64x64 pixels, in its own folder layout."""

from __future__ import annotations

from pathlib import Path

import torch

from .dataset import Dataset
from .image_files import LabelledFiles, image_size_of, photographs
from .memory import InMemory

FOLDER = "tiny-imagenet-200"
_LAYOUT = "wnids.txt, train/WNID/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt"


def load_tiny_imagenet(
    root: str | Path,
    *,
    validation_examples: int = 1000,
    split_seed: int = 0,
    validation_from_test: bool = False,
    in_memory: InMemory = "auto",
    device: torch.device | str = "cpu",
    workers: int = 2,
) -> Dataset:
    """Reads ``root/tiny-imagenet-200``. Its own validation folder is the test set: its test images have no labels.

    Args:
        root: the folder that holds ``tiny-imagenet-200``, or that folder itself.
        validation_examples: how many training examples to hold out.
        split_seed: seed of the draw of those.
        validation_from_test: hold them out of the test set instead.
        in_memory: ``"auto"`` reads everything at once, as uint8 (1.4 GB), if that is at most half of the free memory.
        device: where it will be used, for ``"auto"``; the data set itself is on the CPU.
        workers: loader processes, if it is not in memory.

    Returns:
        The dataset, with inputs ``[n, 3, H, W]``, grey images too; classes are numbered in the order of their sorted
        identifiers, as torchvision's ``ImageFolder`` does.

    Raises:
        FileNotFoundError: no such folder, or something of its layout is missing.
        ValueError: an annotation or an image is not as it should be; ``validation_examples`` out of range.
        ModuleNotFoundError: torchvision is not installed.
    """
    root = Path(root)
    folder = root if is_tiny_imagenet(root) else root / FOLDER
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no Tiny-ImageNet at {folder}; it cannot be downloaded from here: unpack {FOLDER}.zip there"
        )
    wnids = sorted(_text(folder / "wnids.txt").split())
    train, test = _training_files(folder, wnids), _test_files(folder, wnids)
    return photographs(
        "tiny-imagenet",
        len(wnids),
        train,
        test,
        image_size_of(train.paths[0]),
        resize=False,
        validation_examples=validation_examples,
        split_seed=split_seed,
        validation_from_test=validation_from_test,
        in_memory=in_memory,
        device=device,
        workers=workers,
    )


def is_tiny_imagenet(folder: Path) -> bool:
    """Whether a folder has this layout."""
    return (folder / "wnids.txt").is_file()


def _training_files(folder: Path, wnids: list[str]) -> LabelledFiles:
    paths: list[str] = []
    labels: list[int] = []
    for number, wnid in enumerate(wnids):
        images = folder / "train" / wnid / "images"
        found = sorted(str(path) for path in images.glob("*.JPEG"))
        if not found:
            raise FileNotFoundError(f"no images {images}/*.JPEG of the class {wnid}; expected in {folder}: {_LAYOUT}")
        paths += found
        labels += [number] * len(found)
    return LabelledFiles(paths, torch.tensor(labels))


def _test_files(folder: Path, wnids: list[str]) -> LabelledFiles:
    """Images of the validation folder, in the order of its annotations (``file, wnid, box``, separated by tabs)."""
    annotations = folder / "val" / "val_annotations.txt"
    numbers = {wnid: number for number, wnid in enumerate(wnids)}
    paths: list[str] = []
    labels: list[int] = []
    for line in _text(annotations).splitlines():
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in numbers:
            raise ValueError(f"{annotations}: expected an image and one of the classes of wnids.txt, got {line!r}")
        paths.append(str(folder / "val" / "images" / name))
        labels.append(numbers[wnid])
    missing = [path for path in paths if not Path(path).is_file()]
    if missing or not paths:
        raise FileNotFoundError(f"{annotations}: names {len(paths)} images, of which {missing[:3]} are missing")
    return LabelledFiles(paths, torch.tensor(labels))


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; Tiny-ImageNet has {_LAYOUT}")
    return path.read_text(encoding="utf-8")
