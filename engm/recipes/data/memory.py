"""Whether images fit in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

InMemory = bool | Literal["auto"]


def keep_in_memory(choice: InMemory, size: int, *devices: torch.device | str) -> bool:
    """Whether to hold images in memory.

    Args:
        choice: ``"auto"`` if they take at most half of what is free on every one of the devices.
        size: size of the images in bytes.
        devices: where the images would lie.

    Raises:
        ValueError: ``choice`` is none of ``"auto"``, ``True`` and ``False``.
    """
    if isinstance(choice, bool):
        return choice
    if choice != "auto":
        raise ValueError(f"in_memory must be 'auto', True or False, got {choice!r}")
    return all(2 * size <= free_bytes(torch.device(device)) for device in devices)


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, or an estimate of what the host can give without swapping.

    The limit of a container is not seen.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        # Linux's own estimate: unlike the count of free pages it includes the file cache, which is given up if need be.
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # another system
        pass
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
