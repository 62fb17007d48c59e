"""Image classification data from one ``.npz`` file, CIFAR-10 in particular."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from .dataset import Dataset, Split, shuffled_rows

_KEYS = ("x_train", "y_train", "x_test", "y_test")


def load_npz(path: str | Path, *, validation_examples: int = 1000, split_seed: int = 0) -> Dataset:
    """Reads ``x_train [N, H, W, C] uint8``, ``y_train [N]``, ``x_test``, ``y_test`` into tensors in [0, 1].

    Args:
        path: the file.
        validation_examples: how many training examples to hold out (the paper takes 1,000).
        split_seed: seed of the draw of those.

    Returns:
        The dataset, with inputs ``[n, C, H, W]`` float32; as many classes as the largest label says.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a key, shape, dtype or label is not as described.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path}; expected an .npz with the arrays {', '.join(_KEYS)}")
    arrays = _read(path)
    train, test = (_split(arrays[f"x_{part}"], arrays[f"y_{part}"], part, path) for part in ("train", "test"))
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        raise ValueError(
            f"{path}: training and test images differ in shape (as [C, H, W]): "
            f"{list(train.inputs.shape[1:])} and {list(test.inputs.shape[1:])}"
        )
    if not 0 < validation_examples < len(train):
        raise ValueError(
            f"validation_examples must be between 1 and {len(train) - 1} "
            f"(there are {len(train)} training examples), got {validation_examples}"
        )
    rows = shuffled_rows(len(train), split_seed)
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    validation, train = train.take(rows[:validation_examples]), train.take(rows[validation_examples:])
    return Dataset(path.stem, classes, train, validation, test)


def _read(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with file:
            found = {key: file[key] for key in _KEYS if key in file.files}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not an .npz of plain arrays {', '.join(_KEYS)}: {error}") from error
    missing = [key for key in _KEYS if key not in found]
    if missing:
        raise ValueError(f"{path}: expected the arrays {', '.join(_KEYS)}; {', '.join(missing)} missing")
    return found


def _split(images: npt.NDArray[np.generic], labels: npt.NDArray[np.generic], part: str, path: Path) -> Split:
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f"{path}: x_{part} must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}; "
            "pixels are divided by 255 here, not before"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: y_{part} must be integers [{len(images)}], got {labels.dtype} {list(labels.shape)}")
    if not len(labels) or int(labels.min()) < 0:
        raise ValueError(
            f"{path}: y_{part} must hold class indices from 0, and at least one; nothing else is trained on"
        )
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float().div_(255)
    return Split(inputs, torch.from_numpy(labels.astype(np.int64)))
