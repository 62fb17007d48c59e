"""Where the figures of a run are written: CSV, JSON lines or TensorBoard, behind one small protocol."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, Protocol

Figures = Mapping[str, float | None]
"""Figures by name; ``None`` where there is none this time."""


class Logger(Protocol):
    """Takes the figures of one run. Anything with these two methods will do."""

    def log(self, kind: str, index: int, figures: Figures) -> None:
        """Writes one row.

        Args:
            kind: ``"step"`` or ``"epoch"``.
            index: number of the step or epoch, from 1.
            figures: by name, numbers of Python.
        """

    def close(self) -> None:
        """Makes sure that everything is on disk; nothing is logged after it."""


class CsvLogger:
    """One file a kind, ``step.csv`` and ``epoch.csv``, with the columns of its first row.

    Args:
        folder: made if need be; files of an earlier run are overwritten.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = _made(folder)
        self._files: dict[str, IO[str]] = {}
        self._writers: dict[str, csv.DictWriter[str]] = {}

    def log(self, kind: str, index: int, figures: Figures) -> None:
        """Writes one row; a figure of ``None`` is an empty cell.

        Raises:
            ValueError: a figure that the first row of this kind did not have.
        """
        row = {kind: index, **figures}
        if kind not in self._writers:
            file = (self._folder / f"{kind}.csv").open("w", newline="", encoding="utf-8")
            self._files[kind] = file
            self._writers[kind] = csv.DictWriter(file, list(row))
            self._writers[kind].writeheader()
        unknown = sorted(set(row) - set(self._writers[kind].fieldnames))
        if unknown:
            raise ValueError(
                f"{kind}.csv has no column {', '.join(unknown)}: give it in the first row, as None if need be"
            )
        self._writers[kind].writerow(row)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class JsonLinesLogger:
    """One object a line in ``log.jsonl``: ``{"kind": "step", "index": 7, "loss": 1.2}``.

    JSON has no NaN and no infinity: they are written as the strings ``"nan"``, ``"inf"`` and ``"-inf"``, which
    ``float()`` reads.

    Args:
        folder: made if need be; a file of an earlier run is overwritten.
    """

    def __init__(self, folder: Path) -> None:
        self._file = (_made(folder) / "log.jsonl").open("w", encoding="utf-8")

    def log(self, kind: str, index: int, figures: Figures) -> None:
        named = {name: _as_json(value) for name, value in figures.items()}
        self._file.write(json.dumps({"kind": kind, "index": index, **named}, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoardLogger:
    """Scalars ``step/loss``, ``epoch/robust`` and so on, for ``tensorboard --logdir``.

    Args:
        folder: the run's own; TensorBoard hides what an earlier run wrote there.

    Raises:
        ModuleNotFoundError: the package ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self._writer = summary_writer()(str(folder), purge_step=0)

    def log(self, kind: str, index: int, figures: Figures) -> None:
        for name, value in figures.items():
            if value is not None:
                self._writer.add_scalar(f"{kind}/{name}", value, index)

    def close(self) -> None:
        self._writer.close()


class LogFormat(StrEnum):
    """The loggers by the names that the command line takes."""

    CSV = "csv"
    JSON = "json"
    TENSORBOARD = "tensorboard"

    def check(self) -> None:
        """Looks for what the format needs before anything is computed.

        Raises:
            ModuleNotFoundError: it is not installed.
        """
        if self is LogFormat.TENSORBOARD:
            summary_writer()

    def open(self, folder: Path) -> Logger:
        """A logger that writes under ``folder``."""
        if self is LogFormat.CSV:
            return CsvLogger(folder)
        return JsonLinesLogger(folder) if self is LogFormat.JSON else TensorBoardLogger(folder)


def summary_writer() -> Any:
    """``torch.utils.tensorboard.SummaryWriter``, imported here because it takes a second and an extra package.

    Raises:
        ModuleNotFoundError: the package ``tensorboard`` is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "the TensorBoard logger needs the package tensorboard: pip install 'engm[recipes]', or log as csv or json"
        ) from error
    return SummaryWriter


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _as_json(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(float(value))
