"""What is left of a folder in which nothing could be trained, because the network is refused? What was there before."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engm.checks import RefusedError

_SETTINGS = "config.toml"  # the one file that a run may overwrite before anything is trained
_LOCK = ".lock"


@dataclass(frozen=True)
class Before:
    """What a folder was before a command wrote into it.

    Attributes:
        path: the folder.
        missing: this folder and those above it that did not exist, from below.
        entries: the names of what was in it.
        settings: the content of its ``config.toml``, if there was one.
    """

    path: Path
    missing: tuple[Path, ...]
    entries: frozenset[str]
    settings: bytes | None

    @classmethod
    def of(cls, path: Path) -> Before:
        """Looks at a folder, which need not exist."""
        missing = tuple(folder for folder in (path, *path.parents) if not folder.exists())
        entries = frozenset() if missing else frozenset(entry.name for entry in path.iterdir())
        return cls(path, missing, entries, (path / _SETTINGS).read_bytes() if _SETTINGS in entries else None)

    @contextmanager
    def again_if_refused(self, trained: Callable[[], bool]) -> Iterator[None]:
        """Takes back what was made in the folder since, where this context ends in a ``RefusedError``.

        Otherwise the next command, whose options are mended, would go on with the settings of a run that never was.

        Args:
            trained: whether anything in the folder was trained, now or before; then nothing is taken back.
        """
        try:
            yield
        except RefusedError:
            if not trained() and self.path.is_dir():
                self._take_back()
            raise

    def _take_back(self) -> None:
        made = [entry for entry in self.path.iterdir() if entry.name not in self.entries]
        for entry in sorted(made, key=lambda entry: entry.name == _LOCK):  # which is held until nothing else is left
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        if self.settings is not None:
            (self.path / _SETTINGS).write_bytes(self.settings)
        for folder in self.missing:
            try:
                folder.rmdir()
            except OSError:  # somebody else put something into it meanwhile
                return
