"""What a run's objective keeps beside the network, built: LBGAT's guide, the labels of self-adaptive training."""

from __future__ import annotations

from dataclasses import replace

import torch

from engm.adversarial import Beside, Guide, LabelAverages

from ..config import RunConfig
from ..data import Dataset
from ..models.registry import takes_width
from ..processes import Processes
from .batches import seed_for
from .building import build_network, settle_normalization
from .precision import Autocast, check_channels_last


def build_beside(config: RunConfig, dataset: Dataset, processes: Processes) -> Beside | None:
    """What the objective of a configuration keeps beside the network; None for most.

    Args:
        config: a resolved configuration.
        dataset: the data of the run, with extra examples if it has any.
        processes: the processes that train together.

    Raises:
        ValueError: there are several processes, and something is kept; or the guide cannot be built, as
            :func:`build_network`.
    """
    if config.objective not in ("lbgat", "self-adaptive"):
        return None
    if processes.world > 1:
        raise ValueError(
            f"--objective {config.objective} keeps things beside the network, which several processes do not share: "
            "train it in one process, without torchrun"
        )
    return _guide(config, dataset, processes.device) if config.objective == "lbgat" else _averages(dataset)


def _averages(dataset: Dataset) -> LabelAverages:
    """One-hot labels of all training examples, the extra ones behind the others."""
    sources = [dataset.train] if dataset.extra is None else [dataset.train, dataset.extra]
    return LabelAverages(torch.cat([source.labels for source in sources]), dataset.classes)


def _guide(config: RunConfig, dataset: Dataset, device: torch.device) -> Guide:
    """LBGAT's natural network, trained by SGD with the settings of the robust network's."""
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    named = replace(
        config,
        model=config.guide,
        width=config.width if takes_width(config.guide) else None,
        seed=seed_for("guide", config.seed),  # of the same kind of network it is another one
    )
    net = build_network(named, dataset).to(device).to(memory_format=memory_format)
    if config.normalize == "data":
        settle_normalization(net, dataset.train)
    if config.channels_last:
        check_channels_last(net, device)
    sgd = torch.optim.SGD(net.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    # In float16 the guide stays in float32: the loss scale is of the robust network's gradients.
    forward = Autocast(net, device.type, torch.bfloat16) if config.precision == "bf16" else net
    return Guide(forward, sgd)
