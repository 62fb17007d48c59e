"""Any folder of images with a folder for each class, as torchvision's ``ImageFolder`` has it."""

from __future__ import annotations

from pathlib import Path

import torch

from .dataset import Dataset, shuffled_rows
from .extras import import_extra
from .image_files import LabelledFiles, common_size, photographs
from .memory import InMemory


def load_image_folder(
    root: str | Path,
    image_size: int | None = None,
    *,
    validation_examples: int = 1000,
    split_seed: int = 0,
    validation_from_test: bool = False,
    in_memory: InMemory = "auto",
    device: torch.device | str = "cpu",
    workers: int = 2,
) -> Dataset:
    """Reads ``root/train/CLASS/*`` and ``root/test/CLASS/*`` (``root/val`` where there is no ``test``).

    Args:
        root: the folder; its name is the data set's.
        image_size: side in pixels to which images are brought: the shorter side is scaled (bilinear, antialiased),
            then the centre cropped. ``None`` takes them as they are, all of one size.
        validation_examples: how many training examples to hold out.
        split_seed: seed of the draw of those, and of the order of the test set (so that its first so many are a fair
            sample).
        validation_from_test: hold them out of the test set instead.
        in_memory: ``"auto"`` reads everything at once, as uint8, if it takes at most half of the free memory.
        device: where it will be used, for ``"auto"``; the data set itself is on the CPU.
        workers: loader processes, if it is not in memory.

    Returns:
        The dataset, with inputs ``[n, 3, H, W]``; classes are numbered in the alphabetical order of their folders.

    Raises:
        FileNotFoundError: no such folder, no ``train``, no ``test`` or ``val``, no classes, a class without images.
        ValueError: the two folders have different classes; images differ in size and ``image_size`` is ``None``; a file
            cannot be read; ``image_size`` or ``validation_examples`` out of range.
        ModuleNotFoundError: torchvision is not installed.
    """
    root = Path(root)
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    folders = [_folder(root, "train"), _folder(root, "test", "val")]
    classes, others = map(_classes, folders)
    if classes != others:
        only = [
            f"{', '.join(sorted(names))} only in {folder}"
            for folder, names in zip(folders, (set(classes) - set(others), set(others) - set(classes)), strict=True)
            if names
        ]
        raise ValueError(f"training and test images must have the same classes, got {'; '.join(only)}")
    train, test = (_files(folder, classes) for folder in folders)
    order = shuffled_rows(len(test.paths), split_seed)
    test = LabelledFiles([test.paths[row] for row in order.tolist()], test.labels[order])
    size = common_size([*train.paths, *test.paths]) if image_size is None else (image_size, image_size)
    return photographs(
        root.resolve().name,
        len(classes),
        train,
        test,
        size,
        resize=image_size is not None,
        validation_examples=validation_examples,
        split_seed=split_seed,
        validation_from_test=validation_from_test,
        in_memory=in_memory,
        device=device,
        workers=workers,
    )


def _folder(root: Path, *names: str) -> Path:
    """The first of these that is there."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(
        f"no folder {' or '.join(str(root / name) for name in names)}; expected {root}/train/CLASS/*.png and "
        f"{root}/test/CLASS/*.png (or val), or any other format of images"
    )


def _classes(folder: Path) -> list[str]:
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise FileNotFoundError(f"no classes in {folder}: expected a folder of images for each class")
    return found


def _files(folder: Path, classes: list[str]) -> LabelledFiles:
    """Images of every class, below its folder at any depth."""
    listing = import_extra("torchvision.datasets.folder", "image folders")
    numbers = {name: number for number, name in enumerate(classes)}
    try:
        found = listing.make_dataset(str(folder), numbers, listing.IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder}: a class without images: {error}") from error
    return LabelledFiles([path for path, _ in found], torch.tensor([number for _, number in found]))
