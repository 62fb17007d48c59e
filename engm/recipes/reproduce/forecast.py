"""What an analysis would cost, said at once: nothing is trained or loaded for it, operations are counted."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..config import RunConfig
from .cells import Cell, dataset_of
from .expense import Expense, KindCost, cores, kind_of, seconds_of
from .network_counts import COUNTS

NAMED = {
    "digits": (640, 857, 10, (1, 8, 8)),
    "cifar10": (50_000, 10_000, 10, (3, 32, 32)),
    "cifar100": (50_000, 10_000, 100, (3, 32, 32)),
    "svhn": (73_257, 26_032, 10, (3, 32, 32)),
    "tiny-imagenet": (100_000, 10_000, 200, (3, 64, 64)),
}
"""Training and test images, classes and shape of the data sets that have names, as published."""

_DIGITS_VALIDATION = 300
_BACKWARD = 2.0  # operations of a backward pass over those of a forward pass
# Passes of a training step beside those of its attack: the update's, the norms', a second input of TRADES and MART.
_UPDATE, _SECOND_INPUT, _WEIGHTS_MOVED = 1.3, 0.7, 1.3
_CONVOLUTION = 0.85  # speed of a convolution's passes over that of a product of matrices, measured on AVX-512 cores
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


def forecast(cells: Sequence[Cell], runs: Path, device: str, jobs: int | None) -> Expense:
    """What cells would cost, from operation counts, for which no data have to be there.

    Args:
        cells: of one analysis or of several.
        runs: the folder of run folders.
        device: where the cells would compute, as torch writes it. On the processor nothing here imports torch, but for
            networks and data that no table has.
        jobs: number of cells at once; ``None`` for as many as cores (by the runs' threads), on a GPU one.

    Raises:
        FileNotFoundError, ValueError: data that have no name among ours, and are not there or not as they should be.
    """
    threads = max((cell.config.threads or cores() for cell in cells), default=1)
    speed = _operations_a_second(device, threads)
    costs: dict[Any, KindCost] = {}
    for cell in cells:
        kind = kind_of(cell.config)
        if kind in costs:
            continue
        config = cell.config.resolved()
        data = data_facts(config, device)
        operations, modules = count_of(config, data)
        passes = config.attack_steps + _UPDATE
        passes += _SECOND_INPUT * (config.objective != "pgd") + _WEIGHTS_MOVED * config.awp
        one = (1 + _BACKWARD) * operations * config.batch_size / speed + modules * _MODULE_SECONDS
        costs[kind] = KindCost(passes * one, max(1, data.train // config.batch_size), data.validation, data.test)
    trained = sum(cell.is_trained(runs) for cell in cells)
    seconds = sum(seconds_of(cell, costs[kind_of(cell.config)], runs) for cell in cells)
    seconds += _RUN_SECONDS * (len(cells) - trained)
    on_gpu = device != "cpu"
    at_once = jobs or (1 if on_gpu else max(1, min(cores() // threads, len(cells))))
    return Expense(len(cells), trained, seconds, None, at_once, on_gpu)


def data_facts(config: RunConfig, device: str) -> DataFacts:
    """How much data a resolved configuration trains on: of named data sets known, of an ``.npz`` read from its headers.

    Other data are loaded, which may take longer.

    Raises:
        FileNotFoundError, ValueError: as :func:`engm.recipes.data.load_data`.
    """
    path = Path(config.data)
    if config.data in NAMED:
        train, test, classes, shape = NAMED[config.data]
    elif path.suffix == ".npz" and path.is_file():
        train, test, shape = _headers(path)
        classes = 10  # the labels say, but they are not read; the last layer is a small part
    else:
        import torch

        data = dataset_of(config, torch.device(device))
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


def count_of(config: RunConfig, data: DataFacts) -> tuple[int, int]:
    """Operations of a forward pass of one image, and the number of modules without children.

    They are read from :data:`COUNTS`, or counted from the network where that does not have it, which needs torch.
    """
    known = COUNTS.get((config.model, config.width, data.shape, data.classes))
    return known or _counted(config.model, config.width, data.shape, data.classes, config.norm)


@cache
def _counted(model: str, width: int | None, shape: tuple[int, int, int], classes: int, norm: str) -> tuple[int, int]:
    from .counting import counted

    return counted(model, width, shape, classes, norm)


def _operations_a_second(device: str, threads: int) -> float:
    """What convolutions come to here, in less than a tenth of a second: the best of a few turns."""
    return _of_a_gpu(device) if device != "cpu" else threads * _of_a_core()


def _of_a_core() -> float:
    """The same of one core, from products of matrices, which need no torch."""
    from threadpoolctl import threadpool_limits

    size = 512
    matrix = np.ones((size, size), np.float32)
    best = float("inf")
    with threadpool_limits(1):
        for _ in range(4):
            start = time.process_time()
            matrix @ matrix
            best = min(best, time.process_time() - start)
    return _CONVOLUTION * 2 * size**3 / best


def _of_a_gpu(device: str) -> float:
    import torch
    from torch import nn

    layer = nn.Conv2d(64, 64, 3, padding=1, device=device)
    images = torch.zeros(16, 64, 16, 16, device=device, requires_grad=True)
    operations = (1 + _BACKWARD) * 2 * 64 * 64 * 9 * images[0, 0].numel() * len(images)
    best = float("inf")
    for _ in range(4):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        layer(images).sum().backward()
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return operations / best
