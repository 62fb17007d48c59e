"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .atomic_files import make_folder

# A lock lives as long as any copy of its handle, and a forked data-loading worker outlives a killed trainer by seconds.
_HELD: set[int] = set()


class FolderInUseError(RuntimeError):
    """Another process is training in a folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes this the only process that trains in ``folder`` (made if need be), by ``flock`` on its file ``.lock``.

    Raises:
        FolderInUseError: another process, or another ``with`` of this one, holds it.
    """
    make_folder(folder)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if not isinstance(error, BlockingIOError):
            raise
        raise FolderInUseError(
            f"another process is training in {folder}; wait for it or stop it, or choose another folder"
        ) from error
    _HELD.add(handle)
    try:
        yield
    finally:
        if handle in _HELD:  # not in a forked child
            _HELD.remove(handle)
            os.close(handle)


def _release_in_child() -> None:
    while _HELD:
        os.close(_HELD.pop())


os.register_at_fork(after_in_child=_release_in_child)
