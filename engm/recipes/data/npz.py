"""Image classification data from one ``.npz`` file, CIFAR-10 in particular."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path
from zipfile import BadZipFile, is_zipfile

import numpy as np
import numpy.typing as npt
import torch

from .augment import CROP_AND_FLIP
from .dataset import Dataset, Split, hold_out

_FEW_LEVELS = 16.0  # images of up to 255 grey levels reach beyond this, and those in [0, 1] do not
_MOST_CHANNELS = 4  # of ordinary images, with transparency; others have many rows and columns
_KEYS = ("x_train", "y_train", "x_test", "y_test")


def load_npz(
    path: str | Path, *, validation_examples: int = 1000, split_seed: int = 0, validation_from_test: bool = False
) -> Dataset:
    """Reads ``x_train [N, H, W, C] uint8``, ``y_train [N]``, ``x_test``, ``y_test``.

    Args:
        path: the file.
        validation_examples: how many training examples to hold out (the paper takes 1,000).
        split_seed: seed of the draw of those.
        validation_from_test: hold them out of the test set instead, the paper's other reading.

    Returns:
        The dataset, with inputs ``[n, C, H, W]`` uint8; as many classes as the largest training label says.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a key, shape, dtype or label is not as described, channels come first, or the test set has classes
            that the training set has not.
    """
    path = Path(path)
    arrays = read_arrays(path, _KEYS)
    names = (("x_train", "y_train"), ("x_test", "y_test"))
    train, test = (split_of(arrays[x], arrays[y], (x, y), path) for x, y in names)
    if train.shape != test.shape:
        raise ValueError(
            f"{path}: training and test images differ in shape (as [C, H, W]): "
            f"{list(train.shape)} and {list(test.shape)}"
        )
    classes = int(train.labels.max()) + 1
    if int(test.labels.max()) >= classes:
        beyond = sorted(set(test.labels[test.labels >= classes].tolist()))
        raise ValueError(
            f"{path}: y_train has the classes 0 to {classes - 1}, and y_test has {', '.join(map(str, beyond[:5]))} as "
            "well, which no network could learn: do both arrays come from the same data set?"
        )
    unused = sorted(set(range(classes)) - set(train.labels.tolist()))
    if unused:
        start = ": do labels count from 1? They count from 0 here" if unused == [0] else ""
        warnings.warn(
            f"{path}: no training image has the class {', '.join(map(str, unused[:5]))} of 0 to {classes - 1}{start}",
            stacklevel=2,
        )
    splits = hold_out(
        train,
        test,
        validation_examples=validation_examples,
        split_seed=split_seed,
        validation_from_test=validation_from_test,
    )
    return Dataset(path.stem, classes, *splits, CROP_AND_FLIP)


def read_arrays(path: Path, *choices: tuple[str, ...]) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays of an ``.npz``.

    Args:
        path: the file.
        choices: the names of the arrays; where there are several choices, the first whose names are all there is read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is something else, or a name is missing.
    """
    wanted = " or ".join(", ".join(names) for names in choices)
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path}; expected an .npz with the arrays {wanted}")
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with file:
            there = next((names for names in choices if set(names) <= set(file.files)), ())
            missing = [name for name in choices[0] if name not in file.files]
            others = [name for name in file.files if name not in choices[0]]
            found = {name: file[name] for name in there}
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        if isinstance(error, ValueError) and "pickle" in str(error) and not is_zipfile(path):
            # NumPy takes whatever it does not know for a pickle, and says how to load that.
            raise ValueError(f"{path}: not an .npz, whatever its name says") from error
        raise ValueError(f"{path}: not an .npz of plain arrays {wanted}: {error}") from error
    if not found:
        held = f", and it holds {', '.join(others[:8])}" if others else ""
        raise ValueError(f"{path}: expected the arrays {wanted}; {', '.join(missing)} missing{held}")
    return found


def split_of(
    images: npt.NDArray[np.generic], labels: npt.NDArray[np.generic], names: tuple[str, str], path: Path
) -> Split:
    """Images ``[N, H, W, C] uint8`` and labels ``[N]`` as a split, with inputs ``[N, C, H, W]`` uint8.

    Args:
        images: the images.
        labels: class indices, one for each image.
        names: of the two arrays, for messages.
        path: the file that they come from, for messages.

    Raises:
        ValueError: a shape, dtype or label is not as described, or channels come first.
    """
    x, y = names
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f"{path}: {x} must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}; "
            f"pixels are divided by 255 here, not before{_how_to_save(images, x)}"
        )
    _check_channels(images.shape, x, path)
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        one_hot = labels.ndim == 2 and len(labels) == len(images) and labels.shape[1] > 1
        save = f". Save {y}.argmax(1) in its place, if it has a column for each class" if one_hot else ""
        raise ValueError(f"{path}: {y} must be integers [{len(images)}], got {labels.dtype} {list(labels.shape)}{save}")
    if not len(labels) or int(labels.min()) < 0:
        found = f"the lowest is {labels.min()}" if len(labels) else "there is none"
        raise ValueError(f"{path}: {y} must hold class indices from 0, and at least one: {found}")
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return Split(inputs, torch.from_numpy(labels.astype(np.int64)))


def _check_channels(shape: tuple[int, ...], name: str, path: Path) -> None:
    """Refuses arrays that look as if channels came first: few rows, or squares in the last two dimensions alone."""
    _, first, middle, last = shape
    if last > _MOST_CHANNELS and (first <= _MOST_CHANNELS or middle == last != first):
        raise ValueError(
            f"{path}: {name} must be [N, H, W, C] with the channels last, and {list(shape)} would be images of "
            f"{first}x{middle} pixels with {last} channels; if the channels come first, save "
            f"{name}.transpose(0, 2, 3, 1)"
        )


def _how_to_save(images: npt.NDArray[np.generic], x: str) -> str:
    """How images of another kind become what is expected, where that can be said."""
    changed = x
    if images.ndim == 3:
        changed = f"{changed}[..., None]"
    if images.dtype.kind == "f" and images.size:
        lost = ~np.isfinite(images)
        if lost.any():
            where = int(lost.reshape(len(images), -1).any(1).argmax())
            return f". {int(lost.sum())} of its numbers are not finite, the first in image {where}, counted from 0"
        least, most = float(images.min()), float(images.max())
        if 1 < most <= _FEW_LEVELS and least >= 0:
            return f". Its numbers lie between {least:.3g} and {most:.3g}: save whole numbers from 0 to 255"
        if least < 0 or most > 255:
            return f". Its numbers lie between {least:.3g} and {most:.3g}: save them as they were before normalisation"
        changed = f"({changed}{' * 255' if most <= 1 else ''}).round().astype(np.uint8)"
    elif images.dtype.kind in "iu" and images.dtype != np.uint8 and images.size:
        if images.min() < 0 or images.max() > 255:
            return f". Its numbers lie between {images.min()} and {images.max()}: expected grey levels from 0 to 255"
        changed = f"{changed}.astype(np.uint8)"
    return "" if changed == x else f". Save {changed} in its place"
