"""The examples of a measurement, a batch at a time, in front of a copy of the network."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engm
from engm.checks import check_name

Statistics = Literal["training", "evaluation"]


@contextmanager
def copied(net: nn.Module, statistics: Statistics) -> Iterator[nn.Module]:
    """A copy of a network in the mode to look at it in; the network and the random state stay as they are."""
    check_name(statistics, ("training", "evaluation"), what="statistics")
    with torch.random.fork_rng(devices=_cuda_devices(net)), torch.enable_grad():
        yield copy.deepcopy(net).train(statistics == "training")


def _cuda_devices(net: nn.Module) -> list[int]:
    return sorted({p.device.index for p in net.parameters() if p.device.type == "cuda"})


def split(x: Tensor, y: Tensor, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Equal batches.

    Raises:
        ValueError: no examples, labels that do not match, or a last batch that would be smaller than the others: its
            batch statistics would be others.
    """
    if batch_size < 1 or not len(x) or len(x) % batch_size or len(x) != len(y):
        raise ValueError(
            f"expected examples and labels in whole batches of {batch_size}, got {len(x)} examples and {len(y)} labels"
        )
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy ``[n]``, nats."""
    return F.cross_entropy(model(x), y, reduction="none")


def wrapped(net: nn.Module) -> engm.GradNormModule:
    """The engine around a copy, with its default norms; calibrated when asked, never by its own clock."""
    return engm.GradNormModule(net, calibrate_every=10**9)
