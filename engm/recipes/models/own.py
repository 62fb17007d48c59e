"""Networks of one's own: a function or class by its address, what it is called with, and what must come out."""

from __future__ import annotations

import torch
from torch import nn

from engm.adversarial import evaluation_mode

from ..addresses import call, code_identity, explained, is_address, load, takes

NETWORK = "network"  # what an address should be the address of, for messages


def own_network(address: str, *, classes: int, in_channels: int, image_size: int, width: int | None) -> nn.Module:
    """Builds the network that an address names.

    Args:
        address: of a function or class that is called with ``num_classes=``, and with ``in_channels=``,
            ``image_size=`` and ``width=`` if it has parameters of these names.
        classes: number of logits.
        in_channels: channels of the images.
        image_size: side of the images in pixels.
        width: None to leave it at the function's default.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such module or name, it cannot be called so, it fails, it returns no network, or it has no
            ``width``.
    """
    function = load(address, what=NETWORK, also=("torchvision", "timm"))
    if width is not None and not takes(function, "width"):
        raise ValueError(f"width (--width): {address} has no parameter of this name, so leave it out")
    sizes = {"in_channels": in_channels, "image_size": image_size, **({} if width is None else {"width": width})}
    net = call(function, address, {"num_classes": classes}, sizes)
    if not isinstance(net, nn.Module):
        raise ValueError(f"{address} must return a torch.nn.Module, and returned a {type(net).__name__}")
    return net.train()


def code_of_network(name: str) -> dict[str, str]:
    """What tells one version of a network of one's own from another, for results to keep; nothing of other networks."""
    return {"code": code_identity(name, what=NETWORK)} if is_address(name) else {}


def check_logits(net: nn.Module, address: str, shape: tuple[int, int, int], classes: int) -> None:
    """Looks whether a network maps two images to logits; neither it nor the random state is changed.

    Args:
        net: the network.
        address: where it comes from, for the messages.
        shape: ``(C, H, W)`` of an image.
        classes: number of logits that there should be.

    Raises:
        ValueError: it fails, or returns something else than float ``[2, classes]``.
    """
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    parameter = next(net.parameters(), None)
    if parameter is not None:
        images = images.to(parameter.device)
    about = f"{address}, called with images {list(images.shape)},"
    with torch.random.fork_rng(), torch.no_grad(), evaluation_mode(net), explained(about):
        logits = net(images)
    if not isinstance(logits, torch.Tensor):
        raise ValueError(f"{about} must return logits [n, {classes}], and returned a {type(logits).__name__}")
    if logits.shape != (2, classes) or not logits.is_floating_point():
        raise ValueError(
            f"{about} must return logits [2, {classes}], one for each class, and returned {logits.dtype} "
            f"{list(logits.shape)}"
        )
