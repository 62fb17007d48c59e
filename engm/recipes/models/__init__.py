"""Networks used by the recipes."""

from .normalization import Normalization, with_normalization
from .norms import NormName, batch_to_group_norm
from .preact import PreActResNet, preact_resnet18
from .registry import MODELS, build_model
from .resnet import ResNet, resnet18, small_resnet
from .vgg import VGG, vgg8
from .wide import WideResNet, wide_resnet

__all__ = [
    "MODELS",
    "VGG",
    "NormName",
    "Normalization",
    "PreActResNet",
    "ResNet",
    "WideResNet",
    "batch_to_group_norm",
    "build_model",
    "preact_resnet18",
    "resnet18",
    "small_resnet",
    "vgg8",
    "wide_resnet",
    "with_normalization",
]
