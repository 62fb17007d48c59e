"""The constants that the choice between the forms of a norm is made by: how they are kept, read and put into use.

The compiled cost model holds a table of constants for every device, and calls :func:`load` when a device is first used,
which puts a saved table in its place. :func:`engm.tune` measures and saves tables.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .._C import cost_table, cost_table_source, cuda_precision, set_cost_table, set_cost_table_loader

VERSION = 3  # with constants for the matrix products of linear layers on CUDA
ANY = "any"  # key of a CPU's only table: on a CPU the form does not depend on how products are formed

Constants = dict[str, float]
"""One table: constants of the compiled cost model by their names."""


def device_text(device: torch.device | str | int) -> str:
    """A device as the compiled cost model names it: ``"cpu"`` or ``"cuda:<index>"``; any other counts as ``"cpu"``."""
    device = torch.device(device)
    if device.type != "cuda":
        return "cpu"
    index = torch.cuda.current_device() if device.index is None else device.index
    return f"cuda:{index}"


def cost_arguments(device: torch.device, dtype: torch.dtype, *, convolution: bool) -> dict[str, str]:
    """Keyword arguments of ``_C.linear_cost`` and ``_C.conv_cost`` that say by which table an operator chooses.

    Args:
        device: of the operands.
        dtype: of the operands.
        convolution: whether the operator is that of a convolution, which has a TF32 switch of its own.
    """
    text = device_text(device)
    name = str(dtype).removeprefix("torch.")
    return {"device": text, "precision": "float32" if text == "cpu" else cuda_precision(name, convolution)}


def processor_name(device: str) -> str:
    """What the processor calls itself, for example ``"NVIDIA H200"``."""
    if device != "cpu":
        return torch.cuda.get_device_name(int(device.removeprefix("cuda:")))
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine() or "cpu"


def cache_path(device: str) -> Path:
    """The file in the user's cache directory that tables are kept in for all devices with this one's processor name."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = re.sub(r"[^\w.@+-]+", "-", processor_name(device)).strip("-")
    return Path(base) / "engm" / "cost" / f"{name}.json"


def save(path: Path, device: str, tables: Mapping[str, Constants], **notes: Any) -> None:
    """Writes the tables of a device to a file, whole or not at all.

    Args:
        path: the file; its folder is made if need be.
        device: ``"cpu"`` or ``"cuda:<index>"``.
        tables: by precision; of a CPU one under :data:`ANY`.
        notes: what else a reader of the file may want to know.
    """
    document = {
        "version": VERSION,
        "device": device.partition(":")[0],
        "name": processor_name(device),
        "torch": torch.__version__,
        **notes,
        "tables": tables,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(document, indent=1) + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path, device: str) -> dict[str, Constants] | None:
    """The tables in a file by precision, or None if the file is for another kind of device.

    Args:
        path: the file.
        device: ``"cpu"`` or ``"cuda:<index>"``.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file does not hold what :func:`save` writes; the message says what is wrong.
    """
    document = json.loads(path.read_text())
    if not isinstance(document, dict) or document.get("version") != VERSION:
        found = document.get("version") if isinstance(document, dict) else None
        raise ValueError(f"expected a cost table of version {VERSION}, found version {found!r}")
    if document.get("device") != device.partition(":")[0]:
        return None
    tables = document.get("tables")
    if not isinstance(tables, dict) or not tables:
        raise ValueError("it holds no tables")
    for precision, constants in tables.items():
        known = cost_table(device, _precision(precision) or "float32", builtin=True)
        if not isinstance(constants, dict) or set(constants) != set(known):
            raise ValueError(f"table '{precision}' must hold {', '.join(known)}")
        for name, value in constants.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"'{name}' of table '{precision}' must be finite and not negative, found {value!r}")
    return tables


def apply(device: str, tables: Mapping[str, Constants], source: str) -> None:
    """Makes the compiled cost model of one device choose by these tables; ``source`` says where they are from."""
    for precision, constants in tables.items():
        set_cost_table(device, constants, _precision(precision), source)


def load(device: str) -> None:
    """Applies the saved tables of a device, if there are any. The compiled cost model calls this once a device.

    ``ENGM_COST_TABLE`` names a file to read in place of the one in the user's cache; ``built-in`` reads none.
    """
    chosen = os.environ.get("ENGM_COST_TABLE")
    if chosen == "built-in" or (device != "cpu" and not torch.cuda.is_available()):
        return
    path = Path(chosen) if chosen else cache_path(device)
    try:
        if not chosen and not path.exists():
            return
        tables = read(path, device)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"engm chooses by its built-in cost table on {device}, for the one in {path} cannot be used: {error}. "
            f"Measure it again with engm.tune({device!r}), or remove the file.",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    if tables is not None:
        apply(device, tables, str(path))


def describe(devices: set[str]) -> str:
    """Which tables are in use, for people."""
    return ", ".join(f"{cost_table_source(device)} ({device})" for device in sorted(devices) or ["cpu"])


def _precision(key: str) -> str | None:
    """The precision that a table is for, as the compiled cost model takes it: None for all."""
    return None if key == ANY else key


set_cost_table_loader(load)
