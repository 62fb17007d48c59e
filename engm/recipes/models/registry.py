"""Networks by name: ours, torchvision's classifiers, timm's and the user's own, with untrained weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn

from engm.checks import check_name

from ..addresses import is_address, load, takes
from .norms import batch_to_group_norm, norm_layer
from .own import NETWORK, own_network
from .preact import preact_resnet18
from .resnet import resnet18, small_resnet
from .vgg import vgg8
from .wide import wide_resnet

#: Our own networks; each is called with ``classes``, ``in_channels``, ``norm`` and, to shrink it, ``width``.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "small-resnet": small_resnet,
    "resnet18": resnet18,
    "preact-resnet18": preact_resnet18,
    "vgg8": vgg8,
    "wrn-34-10": wide_resnet,
}
_WIDE = re.compile(r"wrn-(\d+)-(\d+)")
_INSTALL = {"torchvision": "pip install 'engm[recipes]'", "timm": "pip install timm"}


def build_model(
    name: str,
    *,
    classes: int,
    in_channels: int = 3,
    image_size: int = 32,
    norm: str = "batch",
    width: int | None = None,
) -> nn.Module:
    """Builds a network with fresh random weights; nothing is ever downloaded.

    Args:
        name: one of :data:`MODELS`, ``wrn-D-K`` (a wide ResNet of any depth ``D = 6k + 4`` and widening ``K``), or a
            name of torchvision's classifiers or of timm's models, looked up in this order. ``torchvision:resnet18`` and
            ``timm:resnet18`` say whose is meant. Upper and lower case are the same, and so are ``_`` and ``-``.
            ``package.module:function`` and ``file.py:function`` are networks of one's own
            (:func:`~engm.recipes.models.own.own_network`).
        classes: number of logits.
        in_channels: channels of the images. Where it is not 3, the first convolution of a torchvision network gets
            PyTorch's default initialization; the others are built for it.
        image_size: side of the images in pixels, for networks that are built for one size; the rest take any.
        norm: ``"batch"`` (whatever the network has) or ``"group"``. Networks that are not ours get group norms in the
            place of their batch norms (:func:`~engm.recipes.models.norms.batch_to_group_norm`).
        width: channels of the stem, to shrink networks that have this parameter; None for the published width.

    Returns:
        A network in training mode that maps ``[n, in_channels, image_size, image_size]`` to logits ``[n, classes]``.

    Raises:
        ValueError: an unknown name (the message has the nearest known ones), an unknown norm, a size below one, a
            ``width`` for a network that has none, or a network that cannot be built with these settings.
        FileNotFoundError: no such file of one's own.
        ModuleNotFoundError: the name needs torchvision or timm, or may be one of theirs, and that is not installed.
    """
    norm_layer(norm)
    if min(classes, in_channels, image_size, 1 if width is None else width) < 1:
        raise ValueError(f"every size must be at least 1, got {classes=}, {in_channels=}, {image_size=}, {width=}")
    if is_address(name):
        net = own_network(name, classes=classes, in_channels=in_channels, image_size=image_size, width=width)
        return batch_to_group_norm(net) if norm == "group" else net
    source, found = _locate(name)
    if not source:
        make = _own(found)
        options = {} if width is None else {"width": width}
        return make(classes=classes, in_channels=in_channels, norm=norm, **options)
    if width is not None:
        raise ValueError(
            f"width shrinks our own networks ({', '.join(MODELS)}); {source}:{found} has none, so leave it out"
        )
    build = _from_torchvision if source == "torchvision" else _from_timm
    try:
        net = build(found, classes, in_channels, image_size)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source}:{found} cannot be built for {in_channels} channels of {image_size}x{image_size} pixels "
            f"and {classes} classes: {error}"
        ) from error
    return batch_to_group_norm(net) if norm == "group" else net


def takes_width(name: str) -> bool:
    """Whether :func:`build_model` takes a ``width`` for a network: ours do, and those of one's own that ask for it.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: as :func:`build_model` of an unknown name.
    """
    if name == "auto":
        return True
    if is_address(name):
        return takes(load(name, what=NETWORK, also=_INSTALL), "width")
    return not _locate(name)[0]


def _own(name: str) -> Callable[..., nn.Module]:
    if name in MODELS:
        return MODELS[name]
    depth, widen = name.split("-")[1:]
    return partial(wide_resnet, int(depth), int(widen))


def _key(name: str) -> str:
    return name.lower().replace("_", "-")


def _locate(name: str) -> tuple[str, str]:
    """Whose network a name means (``""``: ours) and how it is spelled there."""
    prefix, _, rest = name.strip().lower().rpartition(":")
    if prefix:
        check_name(prefix, _INSTALL, what="source of networks")
    key, what = _key(rest), f"network of {prefix}" if prefix else "network"
    known = {} if prefix else {ours: ("", ours) for ours in MODELS}
    if not prefix and _WIDE.fullmatch(key):
        return "", key
    for source in [prefix] if prefix else _INSTALL:
        if key in known:  # the next package need not be there then
            break
        try:
            package = import_module(source)
        except ModuleNotFoundError as error:
            reason = _not_known(key, known, what) if known else f"{name!r} needs {source}"
            raise ModuleNotFoundError(
                f"{reason}. The networks of {source} need that package: {_INSTALL[source]}", name=source
            ) from error
        for theirs in _classifiers(package):
            known.setdefault(_key(theirs), (source, theirs))
    check_name(key, known, what=what)
    return known[key]


def _not_known(key: str, known: Iterable[str], what: str) -> str:
    try:
        check_name(key, known, what=what)
    except ValueError as error:
        return str(error)
    return ""


def _classifiers(package: ModuleType) -> list[str]:
    if package.__name__ == "timm":
        return list(package.list_models())
    return list(package.models.list_models(module=package.models))  # without detection, segmentation and the like


def _from_torchvision(name: str, classes: int, in_channels: int, image_size: int) -> nn.Module:
    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        options = {"image_size": image_size}
    elif name == "maxvit_t":
        options = {"input_size": (image_size, image_size)}
    elif name in ("googlenet", "inception_v3"):  # a tuple of outputs in training mode otherwise
        options = {"aux_logits": False, "init_weights": True}
    net: nn.Module = import_module("torchvision").models.get_model(name, weights=None, num_classes=classes, **options)
    if in_channels != 3:
        _set_input_channels(net, in_channels)
    return net


def _set_input_channels(net: nn.Module, channels: int) -> None:
    first = [module for module in net.modules() if isinstance(module, nn.Conv2d) and module.in_channels == 3]
    if len(first) != 1 or first[0].groups != 1:
        raise ValueError(
            f"its input channels cannot be changed: {len(first)} of its convolutions take 3 channels, expected one"
        )
    stem = first[0]
    stem.in_channels = channels
    stem.weight = nn.Parameter(stem.weight.new_empty(stem.out_channels, channels, *stem.kernel_size))
    stem.reset_parameters()


def _from_timm(name: str, classes: int, in_channels: int, image_size: int) -> nn.Module:
    timm = import_module("timm")
    described = timm.models.get_pretrained_cfg(name)
    sized = described is not None and described.fixed_input_size
    options = {"img_size": image_size} if sized else {}
    net: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=in_channels, **options)
    if getattr(net, "num_classes", classes) != classes:  # some encoders take the number and have no classifier
        raise ValueError("it has no classifier")
    return net
