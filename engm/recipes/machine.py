"""What a run ran on, for its results."""

from __future__ import annotations

import platform
from typing import Any

import torch

import engm


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Device, processor, threads and versions, as plain values."""
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
