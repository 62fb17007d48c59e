"""What a run's objective keeps beside the network, built: LBGAT's guide, the labels of self-adaptive training."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

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
        ValueError, FileNotFoundError, ModuleNotFoundError: the guide cannot be built, as :func:`build_network`.
    """
    match config.objective:
        case "lbgat":
            return _guide(config, dataset, processes)
        case "self-adaptive":
            # Labels of all training examples, the extra ones behind the others.
            sources = [dataset.train] if dataset.extra is None else [dataset.train, dataset.extra]
            labels = torch.cat([source.labels for source in sources]).to(processes.device)
            return LabelAverages(labels, dataset.classes, _group(processes))
        case _:
            return None


def _group(processes: Processes) -> dist.ProcessGroup | None:
    return None if processes.world == 1 else dist.group.WORLD


def _guide(config: RunConfig, dataset: Dataset, processes: Processes) -> Guide:
    """LBGAT's natural network, trained by SGD with the settings of the robust network's."""
    device = processes.device
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
    return Guide(forward, sgd, _group(processes))
