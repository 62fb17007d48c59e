"""Batch or group normalization: chosen where a network is built, or swapped in a network that somebody else built."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from torch import nn

from engm.torch_internals import AnyBatchNorm, own_children

NormName = Literal["batch", "group"]


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalization of 8 groups, or of the largest divisor of 8 that divides the channels."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


_NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "group": group_norm}


def norm_layer(norm: str) -> Callable[[int], nn.Module]:
    """The maker of normalization layers behind a name: called with a number of channels.

    Args:
        norm: ``"batch"`` or ``"group"``.

    Raises:
        ValueError: neither.
    """
    if norm not in _NORMS:
        raise ValueError(f"norm must be one of {sorted(_NORMS)}, got {norm!r}")
    return _NORMS[norm]


def batch_to_group_norm(net: nn.Module) -> nn.Module:
    """Puts a :func:`group_norm` in the place of every ``BatchNorm2d``, with the same scale, shift and epsilon.

    timm's layers that join batch norm to an activation become the sequence of the two. A layer that the network uses
    in several places is one layer afterwards as well.

    Args:
        net: the network, changed in place.

    Returns:
        The network; another module only where ``net`` is a batch norm itself.

    Raises:
        ValueError: it normalizes over the batch with layers of another kind, which are named; ``net`` is unchanged.
    """
    found = {id(module): module for module in net.modules() if isinstance(module, AnyBatchNorm)}
    foreign = {type(module).__name__ for module in found.values() if not _replaceable(module)}
    if foreign:
        raise ValueError(
            f'norm="group" replaces BatchNorm2d; this network also has {", ".join(sorted(foreign))}. '
            'Use norm="batch", or another network'
        )
    replacements = {key: _as_group_norm(module) for key, module in found.items()}
    for parent in list(net.modules()):
        for name, child in own_children(parent).items():  # named_children would pass over the second use of a layer
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
    return replacements.get(id(net), net)


def _replaceable(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d or _has_activation(module)


def _has_activation(module: nn.Module) -> bool:
    """Whether it is timm's ``BatchNormAct2d``: batch norm, then ``drop``, then ``act``."""
    return isinstance(module, nn.BatchNorm2d) and type(module).__name__ == "BatchNormAct2d"


def _as_group_norm(batch: AnyBatchNorm) -> nn.Module:
    group = group_norm(batch.num_features)
    group.eps, group.affine = batch.eps, batch.affine
    group.weight, group.bias = batch.weight, batch.bias  # None without affine parameters, in both kinds of layer
    group.train(batch.training)
    if _has_activation(batch):
        return nn.Sequential(group, batch.get_submodule("drop"), batch.get_submodule("act"))
    return group
