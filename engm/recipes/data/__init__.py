"""Data for the recipes: every loader returns a `Dataset` of three splits."""

from ..data_names import DATASETS
from .augment import CROP_AND_FLIP, Augmentation, Draw
from .dataset import Dataset, Source, Split
from .digits import load_digits
from .extra import with_extra
from .identity import check_same_data, identities, identity
from .image_folder import load_image_folder
from .npz import load_npz
from .own import own_data
from .registry import load_data
from .streamed import StreamedSplit
from .tiny_imagenet import load_tiny_imagenet
from .torch_sets import Placing, from_torch
from .torchvision_sets import load_cifar10, load_cifar100, load_svhn

__all__ = [
    "CROP_AND_FLIP",
    "DATASETS",
    "Augmentation",
    "Dataset",
    "Draw",
    "Placing",
    "Source",
    "Split",
    "StreamedSplit",
    "check_same_data",
    "from_torch",
    "identities",
    "identity",
    "load_cifar10",
    "load_cifar100",
    "load_data",
    "load_digits",
    "load_image_folder",
    "load_npz",
    "load_svhn",
    "load_tiny_imagenet",
    "own_data",
    "with_extra",
]
