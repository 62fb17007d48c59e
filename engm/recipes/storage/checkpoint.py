"""Checkpoints that survive: written atomically, verified by checksum, loaded without unpickling.

A checkpoint is a folder of three files: ``tensors.safetensors``, ``state.json`` (everything that is not a tensor) and
``SHA256SUMS`` over the two, which ``sha256sum -c SHA256SUMS`` checks as well. It is written next to its final place,
flushed to the disk and renamed, so that a process killed at any moment leaves the previous one whole.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..failures import CheckpointError
from .atomic_files import explained, make_folder, synced, write_synced
from .checkpoint_files import decoded, encoded, read

__all__ = ["CheckpointError", "CheckpointStore"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
_ASIDE = re.compile(rf"\.(tmp|old)-({_NAME.pattern})-([0-9]{{1,9}})", re.ASCII)


class CheckpointStore:
    """The checkpoints of one run, by name, in one folder.

    One process writes, under :func:`engm.recipes.storage.folder_lock.locked`; any number may read. Names end in a
    number, ``step-00000200``, and what stands before the number is the prefix of a series, ``step-``.

    Args:
        folder: where they are; made by the first :meth:`save`.
        keep: how many of a series :meth:`prune` leaves, unless told otherwise.

    Raises:
        ValueError: ``keep`` is not positive.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = _checked_keep(keep)
        self._opened = time.time()
        self._whole: set[str] = set()  # written or verified by this object, so not read again to be counted

    def save(self, name: str, tree: Any) -> Path:
        """Writes one checkpoint, replacing one of the same name only once the new one is complete.

        Args:
            name: name, of letters, digits, ``.``, ``_`` and ``-``, such as ``step-00000200``.
            tree: what :func:`engm.recipes.storage.tensor_tree.flatten` takes. Copied to the CPU first.

        Returns:
            The checkpoint's folder.

        Raises:
            TypeError: something in ``tree`` cannot be stored; the message has its path.
            ValueError: ``name`` is not such a name.
            OSError: the disk is full, or another failure while writing, with the file and what to do. Nothing
                half-written stays behind and the checkpoints that there were are as they were.
            ModuleNotFoundError: the package ``safetensors`` is not installed.
        """
        final = self.folder / _checked_name(name)
        files = encoded(tree)
        temporary = self._aside("tmp", name)
        try:
            with explained(final):
                make_folder(self.folder)
                if temporary.exists():
                    shutil.rmtree(temporary)
                temporary.mkdir()
            for file, content in files.items():
                with explained(final / file):
                    write_synced(temporary / file, content)
            with explained(final):
                synced(temporary)
                self._swap_in(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._whole.add(name)
        return final

    def load(self, name: str) -> Any:
        """Reads and verifies one checkpoint. Writes nothing, and unpickles nothing.

        Returns:
            The tree that was saved, its tensors on the CPU.

        Raises:
            CheckpointError: it is missing, truncated, altered by as little as a byte, not one of ours, or of a newer
                format.
            ModuleNotFoundError: the package ``safetensors`` is not installed.
        """
        folder = self._place(name)
        tree = decoded(folder, read(folder))
        self._whole.add(name)
        return tree

    def latest(self, prefix: str = "step-") -> tuple[str, Any] | None:
        """The newest checkpoint of a series that verifies: the one with the highest number.

        Warns (``UserWarning``) about every newer one that is refused.

        Returns:
            Its name and its tree, or ``None`` if there is no checkpoint of this series at all.

        Raises:
            CheckpointError: there are some, and all of them are refused.
        """
        refused: list[CheckpointError] = []
        for name in self.names(prefix):
            try:
                tree = self.load(name)
            except CheckpointError as error:
                refused.append(error)
                continue
            for reason in refused:
                warnings.warn(f"{reason}. The previous one, {name}, is used instead.", stacklevel=2)
            return name, tree
        if refused:
            reasons = "\n".join(f"  {error}" for error in refused)
            raise CheckpointError(
                f"none of the {len(refused)} checkpoints {prefix}* in {self.folder} can be used; restore one of them "
                f"from a copy, or start in another folder:\n{reasons}"
            )
        return None

    def prune(self, prefix: str = "step-", keep: int | None = None) -> None:
        """Deletes old checkpoints of a series, and what killed processes left half-written.

        Only checkpoints that verify count as kept, so a damaged one never pushes out a good one.

        Args:
            prefix: prefix of the series.
            keep: how many of the newest stay; ``None`` for the store's own ``keep``.

        Raises:
            ValueError: ``keep`` is not positive.
            OSError: something could not be deleted.
        """
        left = self.keep if keep is None else _checked_keep(keep)
        self._sweep()
        for name in self.names(prefix):
            if left > 0:
                left -= self._verifies(name)
            else:
                self._delete(name)

    def names(self, prefix: str) -> list[str]:
        """The checkpoints of a series, newest first, damaged ones included."""
        _checked_name(prefix)
        names = {path.name for path in _listed(self.folder)} | {a.name for a in self._asides() if a.kind == "old"}
        numbers = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        found = [(int(number), name) for name, number in numbers.items() if number.isascii() and number.isdecimal()]
        return [name for _, name in sorted(found, reverse=True)]

    def drop_after(self, prefix: str, number: int) -> None:
        """Deletes the checkpoints of a series whose number is greater than ``number``, damaged ones included.

        Raises:
            OSError: one could not be deleted.
        """
        for name in self.names(prefix):
            if int(name.removeprefix(prefix)) > number:
                self._delete(name)

    # -- places -------------------------------------------------------------------------------------------------

    def _aside(self, kind: str, name: str) -> Path:
        return self.folder / f".{kind}-{name}-{os.getpid()}"

    def _asides(self) -> Iterator[_Aside]:
        """Checkpoints being written or deleted (``tmp``) and being replaced (``old``), now or by a killed process."""
        for path in _listed(self.folder):
            found = _ASIDE.fullmatch(path.name)
            if found:
                yield _Aside(path, found[1], found[2], int(found[3]))

    def _replaced(self, name: str) -> list[Path]:
        return [aside.path for aside in self._asides() if (aside.kind, aside.name) == ("old", name)]

    def _place(self, name: str) -> Path:
        """Where the checkpoint is: a process killed while replacing it has left it under its name aside."""
        final = self.folder / _checked_name(name)
        replaced = [] if final.exists() else self._replaced(name)
        return replaced[0] if replaced else final

    # -- changes ------------------------------------------------------------------------------------------------

    def _swap_in(self, temporary: Path, final: Path) -> None:
        """Renames ``temporary`` to ``final``; at any moment ``final`` or exactly one ``old`` of its name is whole."""
        aside = None
        if final.exists():
            self._drop_replaced(final.name)
            aside = self._aside("old", final.name)
            os.rename(final, aside)
        try:
            os.rename(temporary, final)
        except BaseException:
            if aside is not None and not final.exists():
                os.rename(aside, final)
            raise
        synced(self.folder)
        self._drop_replaced(final.name)

    def _drop_replaced(self, name: str) -> None:
        for path in self._replaced(name):
            shutil.rmtree(path)

    def _delete(self, name: str) -> None:
        # Renamed first: killed in the middle, a deletion leaves a temporary and not a damaged checkpoint.
        temporary = self._aside("tmp", name)
        os.rename(self._place(name), temporary)
        shutil.rmtree(temporary)
        self._whole.discard(name)

    def _sweep(self) -> None:
        for aside in list(self._asides()):
            if not self._is_stale(aside):
                continue
            final = self.folder / aside.name
            if aside.kind == "old" and not final.exists():
                os.rename(aside.path, final)
            else:
                shutil.rmtree(aside.path)

    def _is_stale(self, aside: _Aside) -> bool:
        # A living process of that number may be another one than the writer: then the leftover is older than we are.
        return aside.pid == os.getpid() or not _is_alive(aside.pid) or aside.path.stat().st_mtime < self._opened

    def _verifies(self, name: str) -> bool:
        if name not in self._whole:
            try:
                read(self._place(name))
            except CheckpointError:
                return False
            self._whole.add(name)
        return True


@dataclass(frozen=True)
class _Aside:
    path: Path
    kind: str
    name: str
    pid: int


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a checkpoint's name is made of letters, digits, '.', '_' and '-', such as 'step-00000200', got {name!r}"
        )
    return name


def _checked_keep(keep: int) -> int:
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    return keep


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
