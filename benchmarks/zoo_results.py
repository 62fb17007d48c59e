"""What was measured of which network: one JSON-lines file a mode, a network a line, so that a run can go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from engm.recipes.storage.atomic_files import write_text_atomic

Network = tuple[str, str]  # family and name: libraries share names


def network_of(found: dict[str, Any]) -> Network:
    """The network that a line is of."""
    return found["family"], found["name"]


def read(path: Path) -> dict[Network, dict[str, Any]]:
    """Everything that the file holds; nothing where there is no file yet."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {network_of(found): found for found in lines}


def put(path: Path, found: dict[str, Any]) -> None:
    """Adds a network's line to the file, or replaces the line that the network has there.

    The file is written beside the old one and moved into its place: whatever interrupts the writing, no line is lost.
    Processes that measure networks of one mode at the same time wait for each other here.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        lines = read(path) | {network_of(found): found}
        write_text_atomic(path, "".join(json.dumps(lines[network]) + "\n" for network in sorted(lines)))
