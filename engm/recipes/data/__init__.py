"""Data for the recipes: every loader returns a `Dataset` of tensors in [0, 1]."""

from .dataset import Dataset, Split
from .digits import load_digits
from .npz import load_npz

__all__ = ["Dataset", "Split", "load_digits", "load_npz"]
