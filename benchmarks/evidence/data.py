"""The images of the experiment: a part of CIFAR-10 at half its side.

    python benchmarks/evidence/data.py CIFAR10.npz OUT.npz

Every pixel is the mean of four. The training array holds the first images of CIFAR-10's own order, training and
validation images together; ``engm train`` draws the latter.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from regime import TEST, TRAINED, VALIDATION


def halved(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Images ``[n, 2H, 2W, C]`` as ``[n, H, W, C]``, each pixel the rounded mean of four."""
    n, height, width, channels = images.shape
    blocks = images.reshape(n, height // 2, 2, width // 2, 2, channels)
    mean: npt.NDArray[np.uint8] = np.rint(blocks.mean((2, 4), dtype=np.float64)).astype(np.uint8)
    return mean


def write(source: Path, out: Path) -> None:
    """Writes the experiment's images."""
    with np.load(source) as cifar:
        sizes = {"train": TRAINED + VALIDATION, "test": TEST}
        found = {f"x_{part}": halved(cifar[f"x_{part}"][:size]) for part, size in sizes.items()}
        found |= {f"y_{part}": cifar[f"y_{part}"][:size] for part, size in sizes.items()}
    np.savez(out, **found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    write(arguments.source, arguments.out)
