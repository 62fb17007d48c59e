"""The 1,797 handwritten digits that ship with scikit-learn: real 8x8 images, no download."""

from __future__ import annotations

import torch

from .dataset import Dataset, Split, shuffled_rows
from .extras import import_extra

SPLIT_SEED = 20220  # of the split, not of a run: every run and every method sees the same three sets
TEST_EXAMPLES = 857
VALIDATION_EXAMPLES = 300


def load_digits(split_seed: int = SPLIT_SEED) -> Dataset:
    """Digits as 640 training, 300 validation and 857 test images ``[n, 1, 8, 8]`` in [0, 1] (16 grey levels).

    Args:
        split_seed: seed of the shuffle that makes the split.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    raw = import_extra("sklearn.datasets", "digits").load_digits()
    images = torch.as_tensor(raw.images, dtype=torch.float32).div(16).unsqueeze(1)
    everything = Split(images, torch.as_tensor(raw.target, dtype=torch.int64))
    rows = shuffled_rows(len(everything), split_seed)
    test, validation, train = (
        everything.take(part)
        for part in rows.split(
            [TEST_EXAMPLES, VALIDATION_EXAMPLES, len(everything) - TEST_EXAMPLES - VALIDATION_EXAMPLES]
        )
    )
    return Dataset("digits", 10, train, validation, test)
