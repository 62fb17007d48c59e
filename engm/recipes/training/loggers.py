"""Where the figures of a run are written: CSV, JSON, TensorBoard or Weights & Biases, behind one small protocol."""

from __future__ import annotations

import csv
import json
import math
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Protocol
from uuid import uuid4

Figures = Mapping[str, float | None]
"""Figures by name; ``None`` where there is none this time."""


class Logger(Protocol):
    """Takes the figures of one run. Anything with these two methods will do."""

    def log(self, kind: str, index: int, figures: Figures) -> None:
        """Writes one row.

        Args:
            kind: ``"step"`` or ``"epoch"``.
            index: number of the step or epoch, from 1.
            figures: numbers of Python by name.
        """

    def close(self) -> None:
        """Makes sure that everything is on disk; nothing is logged after it."""


class CsvLogger:
    """Writes one file a kind, ``step.csv`` and ``epoch.csv``, with the columns of its first row.

    Rows are on disk as soon as they are logged.

    Args:
        folder: made if need be.
        keep: rows of an earlier run to go on from, as the last index of each kind; without it, files are overwritten.
    """

    def __init__(self, folder: Path, keep: Mapping[str, int] | None = None) -> None:
        self._folder = _made(folder)
        self._keep = dict(keep or {})
        self._files: dict[str, IO[str]] = {}
        self._writers: dict[str, csv.DictWriter[str]] = {}

    def log(self, kind: str, index: int, figures: Figures) -> None:
        """Writes one row; a figure of ``None`` is an empty cell.

        Raises:
            ValueError: a figure that the first row of this kind did not have.
        """
        row = {kind: index, **figures}
        if kind not in self._writers:
            self._open(kind, list(row))
        unknown = sorted(set(row) - set(self._writers[kind].fieldnames))
        if unknown:
            raise ValueError(
                f"{kind}.csv has no column {', '.join(unknown)}: give it in the first row, as None if need be"
            )
        self._writers[kind].writerow(row)

    def _open(self, kind: str, columns: list[str]) -> None:
        path = self._folder / f"{kind}.csv"
        rows: list[dict[str, str]] = []
        if self._keep.get(kind) and path.is_file():
            try:
                with path.open(newline="", encoding="utf-8") as file:
                    reader = csv.DictReader(file)
                    known = list(reader.fieldnames or columns)
                    rows = [row for row in reader if _index_of(row, kind, known) <= self._keep[kind]]
            except (UnicodeDecodeError, csv.Error) as error:
                raise ValueError(
                    f"{path} is damaged ({error}), so that the rows before cannot be kept. Move it away: the run goes "
                    "on without them"
                ) from error
            # An earlier version may have written fewer figures.
            columns = [*known, *(name for name in columns if name not in known)]
        fresh = path.with_suffix(".csv.new")  # is moved into place with the kept rows in it: none is ever missing
        self._files[kind] = fresh.open("w", newline="", encoding="utf-8", buffering=1)
        self._writers[kind] = csv.DictWriter(self._files[kind], columns)
        self._writers[kind].writeheader()
        self._writers[kind].writerows(rows)
        fresh.replace(path)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class JsonLinesLogger:
    """Writes one object a line to ``log.jsonl``: ``{"kind": "step", "index": 7, "loss": 1.2}``.

    JSON has no NaN and no infinity: they are written as the strings ``"nan"``, ``"inf"`` and ``"-inf"``, which
    ``float()`` reads.

    Args:
        folder: made if need be.
        keep: rows of an earlier run to go on from, as the last index of each kind; without it, the file is overwritten.
    """

    def __init__(self, folder: Path, keep: Mapping[str, int] | None = None) -> None:
        path = _made(folder) / "log.jsonl"
        lines = _kept_lines(path, keep) if keep and path.is_file() else []
        fresh = path.with_suffix(".jsonl.new")  # is moved into place with the kept lines in it: none is ever missing
        self._file = fresh.open("w", encoding="utf-8", buffering=1)
        self._file.writelines(lines)
        self._file.flush()
        fresh.replace(path)

    def log(self, kind: str, index: int, figures: Figures) -> None:
        named = {name: _as_json(value) for name, value in figures.items()}
        self._file.write(json.dumps({"kind": kind, "index": index, **named}, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoardLogger:
    """Writes scalars ``step/loss``, ``epoch/robust`` and so on, for ``tensorboard --logdir``.

    Args:
        folder: the run's own; without ``keep`` the events of an earlier run are deleted.
        keep: rows of an earlier run to go on from, as the last index of each kind; TensorBoard hides later steps.

    Raises:
        ModuleNotFoundError: the package ``tensorboard`` is not installed.
    """

    def __init__(self, folder: Path, keep: Mapping[str, int] | None = None) -> None:
        for file in folder.glob("events.out.tfevents.*") if keep is None else ():
            file.unlink()  # two runs within a second have files of which neither is surely the later one
        first = (keep or {}).get("step", -1) + 1
        self._writer = summary_writer()(str(folder), purge_step=first, flush_secs=10)

    def log(self, kind: str, index: int, figures: Figures) -> None:
        for name, value in figures.items():
            if value is not None:
                self._writer.add_scalar(f"{kind}/{name}", value, index)

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """Logs ``step/loss``, ``epoch/robust`` and so on to Weights & Biases, as its own environment variables say.

    ``WANDB_MODE=offline`` writes under ``folder`` alone, for ``wandb sync``; ``WANDB_PROJECT`` names the project
    (``engm`` otherwise). A run that goes on has the same id there; what its process had logged beyond the checkpoint
    comes again, with the same numbers.

    Args:
        folder: made if need be; its parent's name is the name of the run.
        keep: rows of an earlier run to go on from; without it, a new run begins there.

    Raises:
        ModuleNotFoundError: the package ``wandb`` is not installed.
    """

    def __init__(self, folder: Path, keep: Mapping[str, int] | None = None) -> None:
        file = _made(folder) / "wandb-id.txt"
        if keep is None or not file.is_file():
            file.write_text(uuid4().hex[:12], encoding="utf-8")
        settings = folder.parent / "config.toml"
        self._run = wandb_module().init(
            project=os.environ.get("WANDB_PROJECT", "engm"),
            name=folder.absolute().parent.name,
            id=file.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config=tomllib.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {},
        )
        for kind in ("step", "epoch"):
            self._run.define_metric(f"{kind}/*", step_metric=kind)

    def log(self, kind: str, index: int, figures: Figures) -> None:
        named = {f"{kind}/{name}": value for name, value in figures.items() if value is not None}
        self._run.log({kind: index, **named})

    def close(self) -> None:
        self._run.finish()


class LogFormat(StrEnum):
    """The loggers by the names that the command line takes."""

    CSV = "csv"
    JSON = "json"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"

    def check(self) -> None:
        """Looks for what the format needs before anything is computed.

        Raises:
            ModuleNotFoundError: it is not installed.
        """
        if self is LogFormat.TENSORBOARD:
            summary_writer()
        if self is LogFormat.WANDB:
            wandb_module()

    def open(self, folder: Path, keep: Mapping[str, int] | None = None) -> Logger:
        """A logger that writes under ``folder``, after the rows of an earlier run that ``keep`` names (if any)."""
        kinds: dict[LogFormat, Callable[[Path, Mapping[str, int] | None], Logger]] = {
            LogFormat.CSV: CsvLogger,
            LogFormat.JSON: JsonLinesLogger,
            LogFormat.TENSORBOARD: TensorBoardLogger,
            LogFormat.WANDB: WandbLogger,
        }
        return kinds[self](folder, keep)


class Loggers:
    """Several loggers as one."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = list(loggers)

    def log(self, kind: str, index: int, figures: Figures) -> None:
        for logger in self._loggers:
            logger.log(kind, index, figures)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()


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


def wandb_module() -> Any:
    """The package ``wandb``, imported here because it is no part of ``engm[recipes]``.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        return import_module("wandb")
    except ImportError as error:
        raise ModuleNotFoundError(
            "the Weights & Biases logger needs the package wandb: pip install 'engm[wandb]', or log as csv or json"
        ) from error


def _index_of(row: Mapping[str, Any], kind: str, columns: Sequence[str]) -> float:
    """The row's number; a row that a killed process left unfinished counts as the last of all."""
    whole = len(row) == len(columns) and None not in row.values()
    return int(row[kind]) if whole and row[kind].isdigit() else math.inf


def _kept_lines(path: Path, keep: Mapping[str, int]) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:  # cut off when its process was killed
            continue
        if row["index"] <= keep.get(row["kind"], 0):
            kept.append(line)
    return kept


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _as_json(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(float(value))
