"""What this installation of engm was built with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import _C

try:
    __version__ = version("engm")
except PackageNotFoundError:  # a source tree on the path, built in place and not installed
    __version__ = "0+unknown"


def build_info() -> dict[str, Any]:
    """Versions, CUDA architectures compiled in, and which kernels are live on this machine.

    Returns:
        A dict of plain values; print it into bug reports. ``cpu_parallel`` is what the loops of the CPU operators were
        compiled to: ``"OpenMP"``, ``"native"`` (torch's own threads) or ``"none (serial)"``.
    """
    info = dict(_C.build_info())
    return {"engm": __version__, "torch": torch.__version__, "cuda_available": torch.cuda.is_available(), **info}
