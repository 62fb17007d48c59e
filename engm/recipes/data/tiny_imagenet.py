"""Tiny-ImageNet: 200 classes of 500 training and 50 validation images of 64x64 pixels, in its own folder layout."""

from __future__ import annotations

from pathlib import Path

import torch

from .dataset import Dataset
from .image_files import LabelledFiles, image_size_of, photographs
from .memory import InMemory

FOLDER = "tiny-imagenet-200"
ARCHIVE = f"{FOLDER}.zip"
ADDRESS = f"http://cs231n.stanford.edu/{ARCHIVE}"
_LAYOUT = (
    "wnids.txt, train/WNID/images/*.JPEG, and val/images/*.JPEG with val/val_annotations.txt, or val/WNID/images/*.JPEG"
    f" where they were moved into folders of their classes; the archive is at {ADDRESS}"
)


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

    The archive's layout is read as it is: ``wnids.txt``, ``train/WNID/images/*.JPEG``, ``val/images/*.JPEG`` and
    ``val/val_annotations.txt``. So is one whose images of ``val`` were moved to ``val/WNID`` or ``val/WNID/images``, as
    scripts for ``ImageFolder`` do: the images have the same order, and a run goes on with either.

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
        raise FileNotFoundError(f"no Tiny-ImageNet at {folder}; {how_to_get(root)}")
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


def how_to_get(root: Path) -> str:
    """What to do where the folder is missing: unpack the archive, which lies there already or has to be fetched."""
    archive = root / ARCHIVE
    unpack = f"python -m zipfile -e {archive} {root}"
    if archive.is_file():
        return f"the archive is there and has to be unpacked: {unpack}"
    return f"it cannot be downloaded from here: fetch {ADDRESS} (248 MB) to {archive} and unpack it: {unpack}"


def is_tiny_imagenet(folder: Path) -> bool:
    """Whether a folder has this layout."""
    return (folder / "wnids.txt").is_file()


def _training_files(folder: Path, wnids: list[str]) -> LabelledFiles:
    paths: list[str] = []
    labels: list[int] = []
    for number, wnid in enumerate(wnids):
        found = _images_of(folder / "train" / wnid)
        paths += map(str, found)
        labels += [number] * len(found)
    return LabelledFiles(paths, torch.tensor(labels))


def _images_of(folder: Path) -> list[Path]:
    """The images of a class, in the order of their names: in its folder ``images``, or right in it."""
    images = folder / "images"
    found = sorted((images if images.is_dir() else folder).glob("*.JPEG"))
    if not found:
        raise FileNotFoundError(
            f"no images {images}/*.JPEG of the class {folder.name}; expected in {folder.parents[1]}: {_LAYOUT}"
        )
    return found


def _test_files(folder: Path, wnids: list[str]) -> LabelledFiles:
    """Images of the validation folder, as published or moved into folders of their classes, in one order."""
    validation = folder / "val"
    if not (validation / "images").is_dir() and any((validation / wnid).is_dir() for wnid in wnids):
        return _rearranged(validation, wnids)
    return _annotated(validation, wnids)


def _rearranged(validation: Path, wnids: list[str]) -> LabelledFiles:
    """Images that somebody moved into a folder a class, in the published order, which is that of their numbers."""
    found = [(path, number) for number, wnid in enumerate(wnids) for path in _images_of(validation / wnid)]
    found.sort(key=lambda entry: (int("".join(filter(str.isdigit, entry[0].stem)) or 0), entry[0].name))
    return LabelledFiles([str(path) for path, _ in found], torch.tensor([number for _, number in found]))


def _annotated(validation: Path, wnids: list[str]) -> LabelledFiles:
    """Images of the validation folder, in the order of its annotations (``file, wnid, box``, separated by tabs)."""
    annotations = validation / "val_annotations.txt"
    numbers = {wnid: number for number, wnid in enumerate(wnids)}
    paths: list[str] = []
    labels: list[int] = []
    for line in _text(annotations).splitlines():
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in numbers:
            raise ValueError(f"{annotations}: expected an image and one of the classes of wnids.txt, got {line!r}")
        paths.append(str(validation / "images" / name))
        labels.append(numbers[wnid])
    missing = [path for path in paths if not Path(path).is_file()]
    if missing or not paths:
        raise FileNotFoundError(f"{annotations}: names {len(paths)} images, of which {missing[:3]} are missing")
    return LabelledFiles(paths, torch.tensor(labels))


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; Tiny-ImageNet has {_LAYOUT}")
    return path.read_text(encoding="utf-8")
