"""The three files of a checkpoint: what is in them, and how any damage to them is noticed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ..failures import CheckpointError
from .tensor_tree import flatten, unflatten

TENSORS = "tensors.safetensors"
STATE = "state.json"
SUMS = "SHA256SUMS"
FORMAT = "engm checkpoint"
VERSION = 1

_SUMS_LAYOUT = re.compile(rf"[0-9a-f]{{64}}  {TENSORS}\n[0-9a-f]{{64}}  {STATE}\n".encode())


def encoded(tree: Any) -> dict[str, bytes]:
    """Contents of the files by name, in the order in which they are written.

    Raises:
        TypeError: something in ``tree`` cannot be stored.
        ModuleNotFoundError: the package ``safetensors`` is not installed.
    """
    tensors, structure = flatten(tree)
    state = json.dumps({"format": FORMAT, "version": VERSION, "tree": structure}, allow_nan=False) + "\n"
    files = {TENSORS: _safetensors().save(tensors, {"format": "pt"}), STATE: state.encode("ascii")}
    return {**files, SUMS: _sums(files)}


def read(folder: Path) -> dict[str, bytes]:
    """Contents of the files by name, verified.

    Raises:
        CheckpointError: one is missing, too many, truncated or altered.
    """
    if not folder.exists():
        raise CheckpointError(f"{folder}: missing: there is no checkpoint of this name")
    try:
        present = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read as a checkpoint: {error.strerror}") from error
    for file in (TENSORS, STATE, SUMS):
        if file not in present:
            raise CheckpointError(f"{folder / file}: missing")
    extra = sorted(present - {TENSORS, STATE, SUMS})
    if extra:
        raise CheckpointError(f"{folder / extra[0]}: not ours: no such file belongs to a checkpoint; move it elsewhere")
    files = {}
    for file in (TENSORS, STATE, SUMS):
        try:
            files[file] = (folder / file).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{folder / file}: cannot be read: {error.strerror}") from error
    _verify(folder, files)
    return files


def decoded(folder: Path, files: Mapping[str, bytes]) -> Any:
    """The tree in files that :func:`read` has verified, and that may be anybody's still.

    Raises:
        CheckpointError: they are not ours, or of a newer format; the message names the file in ``folder``.
        ModuleNotFoundError: the package ``safetensors`` is not installed.
    """
    safetensors = _safetensors()
    file = STATE
    try:
        state = json.loads(files[STATE])
        if not isinstance(state, dict) or state.get("format") != FORMAT or type(state.get("version")) is not int:
            raise ValueError(f"it does not say {FORMAT!r} and a version")
        if state["version"] > VERSION:
            raise CheckpointError(
                f"{folder / STATE}: newer format version {state['version']}, this engm reads up to {VERSION}; "
                "use the version of engm that wrote it"
            )
        file = TENSORS
        tensors = safetensors.load(files[TENSORS])
        file = STATE
        return unflatten(tensors, state["tree"])
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # the checksums are right, so whoever wrote this, it was not save()
        raise CheckpointError(f"{folder / file}: not ours: {error or type(error).__name__}") from error


def _sums(files: Mapping[str, bytes]) -> bytes:
    return "".join(f"{hashlib.sha256(files[file]).hexdigest()}  {file}\n" for file in (TENSORS, STATE)).encode()


def _verify(folder: Path, files: Mapping[str, bytes]) -> None:
    expected = _sums(files)
    if files[SUMS] == expected:
        return
    if not _SUMS_LAYOUT.fullmatch(files[SUMS]):
        raise CheckpointError(
            f"{folder / SUMS}: truncated or altered: it is not the two lines of checksums of a checkpoint"
        )
    pairs = zip((TENSORS, STATE), files[SUMS].splitlines(), expected.splitlines(), strict=True)
    file = next(file for file, noted, actual in pairs if noted != actual)
    raise CheckpointError(
        f"{folder / file}: checksum differs: it was truncated or altered after it was written (its {len(files[file])} "
        f"bytes do not have the SHA-256 noted in {SUMS}, unless that was altered)"
    )


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "checkpoints need the package safetensors: pip install 'engm[recipes]'", name="safetensors"
        ) from error
    return safetensors.torch
