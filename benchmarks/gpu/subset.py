"""A part of CIFAR-10 that is small enough to carry to a machine with a GPU: one ``.npz``, balanced by class.

    python benchmarks/gpu/subset.py CIFAR10.npz OUT.npz --train 10000 --test 2000
    python benchmarks/gpu/subset.py made-up OUT.npz --train 64 --test 20        random images, for rehearsals

The file has the arrays of the whole one (x_train, y_train, x_test, y_test), and is refused above 50 MiB.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[np.generic]]

KEYS = ("x_train", "y_train", "x_test", "y_test")
LARGEST = 50 << 20  # bytes
MADE_UP = "made-up"


def balanced_rows(labels: npt.NDArray[np.generic], count: int, generator: np.random.Generator) -> npt.NDArray[np.intp]:
    """Draws rows with as many of each class as of any other, up to one, in a drawn order.

    Args:
        labels: ``[N]`` class indices.
        count: how many rows.
        generator: what they are drawn by.

    Raises:
        ValueError: a class has fewer examples than its share.
    """
    classes = np.unique(labels)
    chosen = []
    for position, name in enumerate(classes):
        share = count // len(classes) + (position < count % len(classes))
        rows = np.flatnonzero(labels == name)
        if len(rows) < share:
            raise ValueError(f"{count} examples, balanced, need {share} of class {name}; there are {len(rows)}")
        chosen.append(generator.permutation(rows)[:share])
    return generator.permutation(np.concatenate(chosen))


def subset(arrays: Arrays, train: int, test: int, seed: int = 0) -> Arrays:
    """The arrays of a subset, which depends on ``seed`` and the labels alone.

    Raises:
        ValueError: there are too few examples, or the subset is too large to carry.
    """
    generator = np.random.default_rng(seed)
    found: Arrays = {}
    for part, count in (("train", train), ("test", test)):
        rows = balanced_rows(arrays[f"y_{part}"], count, generator)
        found |= {f"{axis}_{part}": arrays[f"{axis}_{part}"][rows] for axis in "xy"}
    size = sum(array.nbytes for array in found.values())
    if size > LARGEST - (1 << 16):  # the container takes its share
        raise ValueError(f"the subset would take {size / 2**20:.1f} MiB, and {LARGEST >> 20} are the limit: take fewer")
    return found


def made_up(train: int, test: int, seed: int = 0, side: int = 32) -> Arrays:
    """Random images ``[N, side, side, 3]`` of ten classes, with every class in both parts."""
    generator = np.random.default_rng(seed)
    arrays: Arrays = {}
    for part, count in (("train", train + 10), ("test", test + 10)):
        arrays[f"x_{part}"] = generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(count) % 10
    return arrays


def read(path: Path) -> Arrays:
    """The four arrays of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an array is missing.
    """
    with np.load(path, allow_pickle=False) as file:
        missing = [key for key in KEYS if key not in file.files]
        if missing:
            raise ValueError(f"{path} has no {', '.join(missing)}; expected the arrays {', '.join(KEYS)}")
        return {key: file[key] for key in KEYS}


def main() -> None:
    """Writes the subset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help=f"the whole data set as .npz, or {MADE_UP}")
    parser.add_argument("out", type=Path, help="the .npz to write")
    parser.add_argument("--train", type=int, default=10000, help="training examples")
    parser.add_argument("--test", type=int, default=2000, help="test examples")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    given = parser.parse_args()
    if min(given.train, given.test) < 1:
        parser.error("--train and --test must be at least 1")
    try:
        arrays = made_up(given.train, given.test, given.seed) if given.source == MADE_UP else read(Path(given.source))
        found = subset(arrays, given.train, given.test, given.seed)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("wb") as file:  # by its name alone, numpy would add a suffix
        np.savez(file, allow_pickle=False, **found)
    size = given.out.stat().st_size
    print(f"{given.out}: {given.train} training and {given.test} test examples, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
