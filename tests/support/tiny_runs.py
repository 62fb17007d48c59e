"""A data set and a configuration small enough to train in a second."""

from __future__ import annotations

import torch

from engm.recipes.config import RunConfig
from engm.recipes.data import Augmentation, Dataset, Split

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
