"""A data set and a configuration small enough to train in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engm.recipes.config import RunConfig
from engm.recipes.data import Augmentation, Dataset, Split
from engm.recipes.processes import Processes
from engm.recipes.runs.folder import train
from engm.recipes.runs.view import NoView

CPU = Processes(torch.device("cpu"))

PLAIN = RunConfig(
    data="digits",  # replaced by tiny_dataset(); its name settles network and radius
    width=3,
    epochs=3,
    batch_size=16,
    attack_steps=2,
    evaluation_steps=3,
    calibrate_every=4,
    loggers=("csv",),
    log_every=2,
    save_every=2,
    step="eager",  # recording takes longer than the run; test_recorded_steps.py has the bits of recorded runs equal
)


def tiny_dataset() -> Dataset:
    """68 training, 14 validation and 30 test images of 8x8 pixels; which half is brighter is what is to learn."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(112, 1, 8, 8, generator=generator)
    labels = (images[:, 0, :4].mean((1, 2)) > images[:, 0, 4:].mean((1, 2))).long()
    images[labels == 1, 0, :4] *= 0.6
    everything = Split(images, labels)
    train, validation, test = (everything.take(rows) for rows in torch.arange(112).split([68, 14, 30]))
    return Dataset("halves", 2, train, validation, test, Augmentation(padding=1, flip=True))


def train_tiny(config: RunConfig, path: Path, **options: Any) -> dict[str, Any]:
    """The results of a run on :func:`tiny_dataset` in a folder."""
    return train(config, path, CPU, dataset=tiny_dataset(), **options)


class KilledAt(NoView):
    """Raises after so many steps, as a kill would come."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def on_step(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
