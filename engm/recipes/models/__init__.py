"""Networks used by the recipes."""

from .normalization import Normalization, with_normalization
from .norms import NormName, batch_to_group_norm
from .own import check_logits, code_of_network, own_network
from .preact import PreActResNet, preact_resnet18
from .registry import MODELS, build_model, takes_width
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
    "check_logits",
    "code_of_network",
    "own_network",
    "preact_resnet18",
    "resnet18",
    "small_resnet",
    "takes_width",
    "vgg8",
    "wide_resnet",
    "with_normalization",
]
