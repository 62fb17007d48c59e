"""One process at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .atomic_files import make_folder


class FolderInUseError(RuntimeError):
    """Another process is training in a folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes this the only process that trains in ``folder`` (made if need be), by a lock on its file ``.lock``.

    The lock is the kernel's, so it ends with its process, however that ends; forked children do not hold it. A lock
    that is a mere file would outlive a killed process, so none is taken where the file system has no other.

    Raises:
        FolderInUseError: another process, or another ``with`` of this one, holds the lock.
        OSError: the lock's file cannot be written, or the file system has no locks.
    """
    make_folder(folder)
    lock = FileLock(folder / ".lock", blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise FolderInUseError(
            f"another process is training in {folder}; wait for it or stop it, or choose another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()
