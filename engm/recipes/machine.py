"""The machine of a run: its description for the results, and the settings that a configuration asks of it."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .config import RunConfig


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Device, processor, threads and versions, as plain values."""
    import torch

    import engm

    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "device": str(device),
        **gpu,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "engm": engm.__version__,
    }


def set_machine(config: RunConfig) -> None:
    """Sets threads and tensor cores as a configuration asks, for the whole process."""
    import torch

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    torch.backends.cudnn.benchmark = config.fast
