"""Images in files of any format that Pillow reads, as uint8 tensors of one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .augment import CROP_AND_FLIP
from .dataset import Dataset, hold_out
from .extras import import_extra
from .memory import InMemory, keep_in_memory
from .streamed import StreamedSplit, in_threads

_PURPOSE = "images in files"


@dataclass(frozen=True)
class ImageFiles:
    """Images by index; grey ones, and those with a palette or transparency, become RGB.

    Attributes:
        paths: paths of the files.
        size: ``(H, W)`` of every image.
        resize: bring other sizes to this one (which must be square): scale the shorter side (bilinear, antialiased),
            then crop the centre. Otherwise other sizes are refused.
    """

    paths: Sequence[str]
    size: tuple[int, int]
    resize: bool = False

    def __getitem__(self, index: int) -> Tensor:
        """``[3, H, W]`` uint8.

        Raises:
            ValueError: the file cannot be read, holds more than 8 bits a channel, or has another size.
        """
        path = self.paths[index]
        with _opened(path) as image:
            if image.mode[0] in "IF":  # Pillow would cut such values off at 255
                raise ValueError(f"expected 8 bits a channel, got mode {image.mode}")
            functional = import_extra("torchvision.transforms.functional", _PURPOSE)
            image = image.convert("RGB")
            if self.resize:
                image = functional.center_crop(functional.resize(image, [self.size[0]]), list(self.size))
            elif (image.height, image.width) != self.size:
                raise ValueError(f"expected {_size(self.size)}, got {_size((image.height, image.width))}")
            pixels: Tensor = functional.pil_to_tensor(image)
        return pixels


@dataclass(frozen=True)
class LabelledFiles:
    """Files and the class of each.

    Attributes:
        paths: paths of the files.
        labels: ``[n]`` int64.
    """

    paths: Sequence[str]
    labels: Tensor


def common_size(paths: Sequence[str]) -> tuple[int, int]:
    """``(H, W)`` of images that must all have the same; reads no more than the beginning of each file.

    Raises:
        ValueError: they differ, or a file is no image.
    """
    size = image_size_of(paths[0])
    for path, other in zip(paths, in_threads(image_size_of, paths), strict=True):
        if other != size:
            raise ValueError(
                f"images differ in size: {paths[0]} is {_size(size)}, {path} is {_size(other)}; "
                "give an image_size (--image-size) that all are scaled and cropped to"
            )
    return size


def image_size_of(path: str) -> tuple[int, int]:
    """``(H, W)`` of an image.

    Raises:
        ValueError: it is none.
    """
    with _opened(path) as image:
        return image.height, image.width


def photographs(
    name: str,
    classes: int,
    train: LabelledFiles,
    test: LabelledFiles,
    size: tuple[int, int],
    *,
    resize: bool,
    validation_examples: int,
    split_seed: int,
    validation_from_test: bool,
    in_memory: InMemory,
    device: torch.device | str,
    workers: int,
) -> Dataset:
    """A data set of image files, read now if they fit in memory (the host's and the device's), else when needed.

    Raises:
        ValueError: too few examples to hold some out, or a file that cannot be read.
    """
    sources = (
        StreamedSplit(ImageFiles(files.paths, size, resize), files.labels, (3, *size), workers=workers)
        for files in (train, test)
    )
    splits = hold_out(
        *sources,
        validation_examples=validation_examples,
        split_seed=split_seed,
        validation_from_test=validation_from_test,
    )
    bytes_of_all = (len(train.paths) + len(test.paths)) * 3 * size[0] * size[1]
    if keep_in_memory(in_memory, bytes_of_all, "cpu", device):
        train_split, validation, test_split = (split.in_memory() for split in splits)
        return Dataset(name, classes, train_split, validation, test_split, CROP_AND_FLIP)
    return Dataset(name, classes, *splits, CROP_AND_FLIP)


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """A Pillow image; whatever goes wrong with it is said of ``path``."""
    pillow = import_extra("PIL.Image", _PURPOSE)
    try:
        with pillow.open(path) as image:
            yield image
    # SyntaxError is what Pillow says of a broken PNG.
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be used as an image ({error}); replace or delete it") from error


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} (height x width)"
