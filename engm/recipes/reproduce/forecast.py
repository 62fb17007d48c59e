"""What an analysis would cost, said at once: nothing is trained or loaded for it, operations are counted."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import RunConfig
from ..models import build_model
from .cells import Cell, dataset_of
from .expense import Expense, KindCost, cores, kind_of, seconds_of

# Training and test images, classes and shape of the data sets that have names, as published.
_NAMED = {
    "digits": (640, 857, 10, (1, 8, 8)),
    "cifar10": (50_000, 10_000, 10, (3, 32, 32)),
    "cifar100": (50_000, 10_000, 100, (3, 32, 32)),
    "svhn": (73_257, 26_032, 10, (3, 32, 32)),
    "tiny-imagenet": (100_000, 10_000, 200, (3, 64, 64)),
}
_DIGITS_VALIDATION = 300
# Operations of a forward pass of one image of 32 by 32 pixels, modules without children, and the published width.
_COUNTED = {
    "small-resnet": (2.500e7, 20, 16),
    "resnet18": (1.111e9, 46, 64),
    "preact-resnet18": (1.111e9, 38, 64),
    "vgg8": (1.357e8, 11, 64),
    "wrn-34-10": (1.332e10, 66, 16),
    "wrn-16-1": (5.331e7, 29, 16),
    "wrn-10-1": (2.500e7, 17, 16),
}
_BACKWARD = 2.0  # operations of a backward pass over those of a forward pass
# Passes of a training step beside those of its attack: the update's, the norms', a second input of TRADES and MART.
_UPDATE, _SECOND_INPUT, _WEIGHTS_MOVED = 1.3, 0.7, 1.3
_RUN_SECONDS = 1.0  # first step, checkpoints and files of a run
_MODULE_SECONDS = 1.2e-4  # what Python and the dispatcher take for one module in a forward and backward pass


@dataclass(frozen=True)
class DataFacts:
    """How much data there is.

    Attributes:
        train: number of training examples.
        validation: number of validation examples.
        test: number of test examples.
        classes: number of classes.
        shape: ``(C, H, W)`` of an image.
    """

    train: int
    validation: int
    test: int
    classes: int
    shape: tuple[int, int, int]


def forecast(cells: Sequence[Cell], runs: Path, device: torch.device, jobs: int | None) -> Expense:
    """What cells would cost, from operation counts, for which no data have to be there.

    Args:
        cells: of one analysis or of several.
        runs: the folder of run folders.
        device: where the cells would compute.
        jobs: number of cells at once; ``None`` for as many as cores (by the runs' threads), on a GPU one.

    Raises:
        FileNotFoundError, ValueError: data that have no name among ours, and are not there or not as they should be.
    """
    speed = _operations_a_second(device)
    costs: dict[Any, KindCost] = {}
    counts: dict[Any, tuple[float, float]] = {}
    for cell in cells:
        kind = kind_of(cell.config)
        if kind in costs:
            continue
        config = cell.config.resolved()
        data = data_facts(config, device)
        network = (config.model, config.width, config.norm, data.classes, data.shape)
        if network not in counts:
            counts[network] = count_of(config, data)
        operations, modules = counts[network]
        passes = config.attack_steps + _UPDATE
        passes += _SECOND_INPUT * (config.objective != "pgd") + _WEIGHTS_MOVED * config.awp
        one = (1 + _BACKWARD) * operations * config.batch_size / speed + modules * _MODULE_SECONDS
        costs[kind] = KindCost(passes * one, max(1, data.train // config.batch_size), data.validation, data.test)
    trained = sum(cell.is_trained(runs) for cell in cells)
    seconds = sum(seconds_of(cell, costs[kind_of(cell.config)], runs) for cell in cells)
    seconds += _RUN_SECONDS * (len(cells) - trained)
    threads = max((cell.config.threads or cores() for cell in cells), default=1)
    at_once = jobs or (1 if device.type == "cuda" else max(1, min(cores() // threads, len(cells))))
    return Expense(len(cells), trained, seconds, None, at_once, device.type == "cuda")


def data_facts(config: RunConfig, device: torch.device) -> DataFacts:
    """How much data a resolved configuration trains on: of named data sets known, of an ``.npz`` read from its headers.

    Other data are loaded, which may take longer.

    Raises:
        FileNotFoundError, ValueError: as :func:`engm.recipes.data.load_data`.
    """
    path = Path(config.data)
    if config.data in _NAMED:
        train, test, classes, shape = _NAMED[config.data]
    elif path.suffix == ".npz" and path.is_file():
        train, test, shape = _headers(path)
        classes = 10  # the labels say, but they are not read; the last layer is a small part
    else:
        data = dataset_of(config, device)
        return DataFacts(len(data.train), len(data.validation), len(data.test), data.classes, data.train.shape)
    held = _DIGITS_VALIDATION if config.data == "digits" else config.validation_examples
    if config.validation_from_test:
        test -= held
    elif config.data != "digits":
        train -= held
    train, test = min(train, config.train_examples or train), min(test, config.test_examples or test)
    return DataFacts(train, held, test, classes, shape)


def _headers(path: Path) -> tuple[int, int, tuple[int, int, int]]:
    """Numbers of training and test images and the shape of one, without reading an image."""
    shapes = {}
    with zipfile.ZipFile(path) as file:
        for name in ("x_train", "x_test"):
            with file.open(f"{name}.npy") as array:
                read: Callable[[Any], tuple[tuple[int, ...], bool, np.dtype[Any]]] = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[np.lib.format.read_magic(array)]
                shapes[name] = read(array)[0]
    train, test = shapes["x_train"], shapes["x_test"]
    return train[0], test[0], (train[3], train[1], train[2])


def count_of(config: RunConfig, data: DataFacts) -> tuple[float, float]:
    """Operations of a forward pass of one image, and the number of modules without children.

    Of networks in :data:`_COUNTED` they are known, and grow with the pixels and with the square of the width.
    """
    if config.model in _COUNTED:
        operations, modules, width = _COUNTED[config.model]
        pixels = data.shape[1] * data.shape[2] / 32**2
        return operations * pixels * ((config.width or width) / width) ** 2, modules
    return counted(config, data)


def counted(config: RunConfig, data: DataFacts) -> tuple[float, float]:
    """The same by a forward pass, in which hooks on convolutions and linear layers multiply weights by positions."""
    net = build_model(
        config.model,
        classes=data.classes,
        in_channels=data.shape[0],
        image_size=data.shape[1],
        norm=config.norm,
        width=config.width,
    ).eval()
    operations = 0.0

    def count(layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal operations
        weight = layer.get_parameter("weight")
        operations += 2 * weight.numel() * output.numel() / weight.shape[0]

    for module in net.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        net(torch.zeros(1, *data.shape))
    return operations, sum(not any(m.children()) for m in net.modules())


def _operations_a_second(device: torch.device) -> float:
    """What convolutions come to on this machine, in a tenth of a second: the best of a few turns."""
    layer = nn.Conv2d(64, 64, 3, padding=1, device=device)
    images = torch.zeros(16, 64, 16, 16, device=device, requires_grad=True)
    operations = (1 + _BACKWARD) * 2 * 64 * 64 * 9 * images[0, 0].numel() * len(images)
    best = float("inf")
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        layer(images).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return operations / best
