"""Averages of the weights beside the network that trains: exponential over steps (EMA), or even over epochs (SWA)."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from ..config import RunConfig
from ..data import Source

LOOKED_AT = 500  # images at a time


class WeightAverage:
    """The average that a configuration asks for, if it asks for one.

    Args:
        config: names ``ema`` or ``swa_start``.
        net: the network that trains.

    Attributes:
        model: torch's average, whose ``module`` is a network with the averaged weights; ``None`` without an average.
    """

    def __init__(self, config: RunConfig, net: nn.Module) -> None:
        self._swa_start = config.swa_start
        self.model: AveragedModel | None = None
        if config.ema:
            self.model = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        elif config.swa_start is not None:
            self.model = AveragedModel(net)

    @property
    def network(self) -> nn.Module | None:
        """The network with the averaged weights; ``None`` as long as nothing has been averaged."""
        if self.model is None or not int(self.model.n_averaged):
            return None
        module: nn.Module = self.model.module
        return module

    def after_step(self, net: nn.Module, epoch: int, *, last: bool) -> None:
        """Takes the weights into the average, if it is time.

        Args:
            net: the network after a step.
            epoch: number of the step's epoch, from 1.
            last: whether the step was the epoch's last.
        """
        if self.model is None:
            return
        if self._swa_start is None or (last and epoch >= self._swa_start):
            self.model.update_parameters(net)

    def settle(self, source: Source) -> None:
        """Computes running statistics that belong to evenly averaged weights, which no forward pass has made.

        They are means over the batches of the training images, without augmentation or attack, as of
        ``torch.optim.swa_utils.update_bn``. Random states stay as they are. An exponential average has averaged
        statistics, and is left alone.
        """
        network = self.network
        if network is None or self._swa_start is None:
            return
        devices = sorted({p.device.index for p in network.parameters() if p.device.type == "cuda"})
        batches = source.batches(torch.arange(len(source)).split(LOOKED_AT))
        with torch.random.fork_rng(devices=devices):
            update_bn((x for x, _ in batches), network)
