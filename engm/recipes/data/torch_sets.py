"""Anybody's map-style data sets of ``(image, label)``, as torchvision and ``torch.utils.data`` have them, as ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .augment import CROP_AND_FLIP, Augmentation
from .dataset import Dataset, Source, Split, check_labels, hold_out, shuffled_rows
from .extras import import_extra
from .identity import identity
from .memory import InMemory, keep_in_memory
from .streamed import StreamedSplit

_HELD_FOR_TEST = 5  # of a data set without a test set every fifth image is held out for testing


@dataclass(frozen=True)
class Placing:
    """How a data set is split and where its images go; see :func:`engm.recipes.data.load_data`."""

    image_size: int | None = None
    validation_examples: int | None = 1000
    split_seed: int = 0
    validation_from_test: bool = False
    in_memory: InMemory = "auto"
    device: torch.device | str = "cpu"
    workers: int = 2

    @property
    def held_out(self) -> dict[str, Any]:
        """What :func:`hold_out` takes."""
        return {
            "validation_examples": 1 if self.validation_examples is None else self.validation_examples,
            "split_seed": self.split_seed,
            "validation_from_test": self.validation_from_test,
        }

    def check_own_validation(self, name: str) -> None:
        """Refuses options that say what to hold out of data which have a validation set.

        Raises:
            ValueError: one is not at its default.
        """
        if self.validation_examples is not None and self.held_out != Placing().held_out:
            raise ValueError(
                f"{name} has a validation set of its own: leave --validation-examples and --validation-from-test "
                "(validation_examples, split_seed, validation_from_test) at their defaults"
            )


@dataclass(frozen=True)
class TorchImages:
    """The images of a data set by index.

    Attributes:
        items: the data set; ``items[index]`` is ``(image, label)``.
        name: of the data set, for messages.
        image_size: side to which images are brought (the shorter side is scaled, bilinear and antialiased, then the
            centre cropped); None takes them as they are.
        shape: ``(C, H, W)`` that every image must have; None accepts any. Pillow's images become grey or RGB by it.
    """

    items: Any
    name: str
    image_size: int | None = None
    shape: tuple[int, int, int] | None = None

    def __getitem__(self, index: int) -> Tensor:
        """``[C, H, W]``, uint8, or float32 in [0, 1].

        Raises:
            ValueError: it is no such image, or has another shape.
        """
        return self.pixels(_item(self.items, index, self.name)[0], index)

    def pixels(self, image: Any, index: int) -> Tensor:
        """An image of the data set as a tensor; see :meth:`__getitem__`."""
        found = self._tensor(image, f"image {index} of {self.name}")
        if self.image_size is not None:
            functional = import_extra("torchvision.transforms.functional", "images of another size")
            scaled = functional.resize(found, [self.image_size], antialias=True)
            found = functional.center_crop(scaled, [self.image_size] * 2)
        if self.shape is not None and tuple(found.shape) != self.shape:
            raise ValueError(
                f"images of {self.name} differ in shape: the first is {list(self.shape)}, image {index} is "
                f"{list(found.shape)}; give an image_size (--image-size) that all are scaled and cropped to"
            )
        return found

    def _tensor(self, image: Any, about: str) -> Tensor:
        if hasattr(image, "getbands"):  # one of Pillow's
            if image.mode[0] in "IF":  # Pillow would cut such values off at 255
                raise ValueError(f"{about}: expected 8 bits a channel, got mode {image.mode}")
            grey = image.mode in ("L", "1") if self.shape is None else self.shape[0] == 1
            image = np.array(image.convert("L" if grey else "RGB"))
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
            array = torch.from_numpy(np.ascontiguousarray(image))
            return array.unsqueeze(0) if array.dim() == 2 else array.permute(2, 0, 1).contiguous()
        if isinstance(image, Tensor) and image.dim() in (2, 3) and image.dtype in (torch.uint8, torch.float32):
            found = image.unsqueeze(0) if image.dim() == 2 else image
            if found.is_floating_point() and not bool(found.isfinite().all()):
                raise ValueError(f"{about} has values that are not finite, expected numbers in [0, 1]")
            if found.is_floating_point() and not (float(found.min()) >= 0 and float(found.max()) <= 1):
                raise ValueError(
                    f"{about} has values in [{float(found.min()):.4g}, {float(found.max()):.4g}], expected [0, 1]: "
                    "leave the normalisation out of the data and put it inside of the network, so that radii of "
                    "attacks are in units of pixels"
                )
            return found
        raise ValueError(
            f"{about} must be a Pillow image, a tensor [C, H, W] (uint8, or float32 in [0, 1]) or an array [H, W, C] "
            f"of uint8, got {_described(image)}"
        )


def from_torch(
    name: str,
    train: Any,
    test: Any = None,
    *,
    validation: Any = None,
    placing: Placing,
    classes: int | None = None,
) -> Dataset:
    """Two or three data sets of ``(image, label)`` as one of ours.

    Args:
        name: as reports print it.
        train: training examples; ``train[index]`` is an image (of Pillow's; a tensor ``[C, H, W]``, uint8, or float32
            in [0, 1]; an array ``[H, W, C]`` uint8) and an integer label, the same each time.
        test: test examples; None to hold every fifth of ``train`` out, drawn by the split's seed.
        validation: validation examples; None to hold them out.
        placing: how it is split, and where the images go.
        classes: how many; None: as many as ``train.classes`` lists, or as the largest training label says.

    Returns:
        The dataset, on the CPU; with crops and flips as its augmentation if its images have colours, else with none.

    Raises:
        ValueError: images or labels are not as described, differ from one reading to the next, the test images are the
            training images, or there are too few.
    """
    if validation is not None:
        placing.check_own_validation(name)
    parts = {"training": train, "validation": validation, "test": test}
    labels = {part: _labels(items, f"{part} set of {name}") for part, items in parts.items() if items is not None}
    shape = _shape(TorchImages(train, f"the training set of {name}", placing.image_size))
    if classes is None:
        classes = len(train.classes) if hasattr(train, "classes") else int(labels["training"].max()) + 1
    for part, found in labels.items():
        check_labels(found, classes, f"{name}, {part} set")
    sources = {
        part: StreamedSplit(
            TorchImages(parts[part], f"the {part} set of {name}", placing.image_size, shape),
            found,
            shape,
            workers=placing.workers,
        )
        for part, found in labels.items()
    }
    size = sum(map(len, labels.values())) * sources["training"].image(0).nbytes
    keep = keep_in_memory(placing.in_memory, size, "cpu", placing.device)
    splits: dict[str, Source] = {part: _read(source) if keep else source for part, source in sources.items()}
    augment = CROP_AND_FLIP if shape[0] == 3 else Augmentation()
    return Dataset(name, classes, *_three(name, splits, placing), augment)


def _three(name: str, splits: dict[str, Any], placing: Placing) -> tuple[Source, Source, Source]:
    """Training, validation and test examples out of what there is."""
    train = splits["training"]
    if "test" not in splits:
        rows = shuffled_rows(len(train), placing.split_seed)
        count = len(rows) // _HELD_FOR_TEST
        if not count:
            raise ValueError(f"{name} has no test set and only {len(train)} images, too few to hold some out")
        test, train = train.take(rows[:count]), train.take(rows[count:])
    else:
        test = splits["test"]
        if identity(train) == identity(test):
            raise ValueError(f"{name}: the test images are the training images; a test of them would say nothing")
    if "validation" in splits:
        return train, splits["validation"], test
    return hold_out(train, test, **placing.held_out)


def _read(source: StreamedSplit) -> Split:
    """All examples, one after the other: a data set of somebody else's need not bear threads."""
    return Split(torch.stack([source.image(row) for row in range(len(source))]), source.labels)


def _shape(images: TorchImages) -> tuple[int, int, int]:
    """``(C, H, W)`` of the first image, which must be the same each time it is read."""
    first, again = images[0], images[0]
    if not torch.equal(first, again):
        raise ValueError(
            f"{images.name} gives another image each time that it is asked for the first: leave random transforms out; "
            "--augment crops and flips"
        )
    channels, height, width = first.shape
    return channels, height, width


def _labels(items: Any, about: str) -> Tensor:
    """``[n]`` int64: the attribute ``targets`` or ``labels`` if it agrees with some items, else of every item."""
    if not hasattr(items, "__len__") or not hasattr(items, "__getitem__"):
        raise ValueError(f"the {about} must have a length and items by index, got {_described(items)}")
    if not len(items):
        raise ValueError(f"the {about} is empty")
    for attribute in ("targets", "labels"):
        known = getattr(items, attribute, None)
        if isinstance(known, Sequence | Tensor | np.ndarray) and len(known) == len(items):
            found = torch.as_tensor(np.asarray(known)) if not isinstance(known, Tensor) else known
            places = {0, len(items) // 2, len(items) - 1}
            integers = found.dim() == 1 and not found.is_floating_point()
            if integers and all(int(found[row]) == _label(items, row, about) for row in places):
                return found.to(torch.int64).cpu()
    return torch.tensor([_label(items, row, about) for row in range(len(items))])


def _label(items: Any, row: int, about: str) -> int:
    label = _item(items, row, about)[1]
    single = isinstance(label, Tensor | np.generic | np.ndarray) and np.prod(label.shape) == 1
    value = label.item() if single else label
    if not isinstance(value, int):
        raise ValueError(
            f"label {row} of the {about} must be the integer index of a class, from 0, got {_described(label)}"
        )
    return value


def _item(items: Any, index: int, about: str) -> tuple[Any, Any]:
    item = items[index]
    if not (isinstance(item, tuple | list) and len(item) == 2):
        raise ValueError(f"item {index} of the {about} must be (image, label), got {_described(item)}")
    return item[0], item[1]


def _described(value: Any) -> str:
    """A value in a message: its type, and of tensors and arrays also dtype and shape."""
    shape = getattr(value, "shape", None)
    return type(value).__name__ + (f" of {value.dtype} {list(shape)}" if shape is not None else f" ({value!r:.60})")
