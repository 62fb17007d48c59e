"""Small files written whole or not at all, and the flushing and the error messages that this takes."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON; the message names the file.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got something else ({error}); restore or delete it") from error


def read_object(path: Path, *names: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: the file.
        names: of values that must be in the object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or no such object; the message names the file.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object of JSON, got a {type(found).__name__}; restore or delete it")
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} is missing; restore or delete it")
    return found


def write_json(path: Path, value: Any) -> None:
    """Writes JSON by :func:`write_text_atomic`.

    JSON has no NaN and no infinity: they are written as the strings ``"nan"``, ``"inf"`` and ``"-inf"``, which
    ``float()`` reads, as :class:`engm.recipes.training.loggers.JsonLinesLogger` does.

    Args:
        path: file to write, in a folder that exists.
        value: dicts, lists and tuples of numbers, strings, booleans and ``None``.

    Raises:
        TypeError: ``value`` holds anything else.
        OSError: as :func:`write_text_atomic`.
    """
    write_text_atomic(path, json.dumps(_as_json(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) whole or not at all: see :func:`replaced_when_whole`.

    Args:
        path: file to write, in a folder that exists; one that is there is replaced.
        text: content of the file.

    Raises:
        OSError: it could not be written; what was there before is there still.
    """
    with replaced_when_whole(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


@contextmanager
def replaced_when_whole(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; flushed and renamed to ``path`` when the context ends without an exception.

    Raises:
        OSError: it could not be written; what was there before is there still.
    """
    temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")  # it keeps its suffix, which writers look at
    try:
        with explained(path):
            yield temporary
            synced(temporary)
            os.replace(temporary, path)
            synced(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk; not atomic."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def synced(path: Path) -> None:
    """Waits until a file's content, or the names inside of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Makes ``folder`` and its parents if need be.

    Raises:
        OSError: it cannot be made; the message says why.
    """
    if folder.is_dir():
        return
    for above in (folder, *folder.parents):
        if above.exists() and not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"cannot make this folder, because {above} is a file", str(folder))
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        synced(folder.parent)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Failures in here name ``path``, as the user knows it, and say what to do."""
    try:
        yield
    except OSError as error:
        advice = (
            "free some space on that disk, then run the same command again"
            if error.errno in _FULL
            else "see to it that this folder can be written"
        )
        message = f"cannot write: {error.strerror or error}; what was there before is intact: {advice}"
        raise OSError(error.errno or errno.EIO, message, str(path)) from error


def _as_json(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, dict):
        return {key: _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    return value
