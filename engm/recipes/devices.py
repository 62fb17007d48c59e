"""Where does a command compute? The device that a name stands for, and whether it can only be the processor."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# What drivers of GPUs that torch computes on bring along.
_DRIVERS = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libamdhip64.so")


def only_cpu(name: str) -> bool:
    """Whether a device's name can stand for nothing but the processor here, as far as can be told without torch.

    Args:
        name: as :func:`choose_device` takes it.
    """
    return name == "cpu" or (name == "auto" and not any(_loads(driver) for driver in _DRIVERS))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def choose_device(name: str) -> torch.device:
    """The device that a name stands for; ``"auto"`` is the GPU, if there is one.

    Raises:
        ValueError: no such device here.
    """
    import torch  # imported here, because a plan for the processor needs none

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown --device {name!r}: use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no GPU here (engm doctor says more); use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here, counted from 0")
    return device
