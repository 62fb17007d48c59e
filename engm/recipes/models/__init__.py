"""Networks used by the recipes."""

from .resnet import ResNet, resnet18, small_resnet

__all__ = ["ResNet", "resnet18", "small_resnet"]
