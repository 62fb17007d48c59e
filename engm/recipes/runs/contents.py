"""What a folder holds that a command wrote: one run, several, an analysis, a demonstration, or something else."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

RESULTS = "results.json"  # what says what a run came to, when it is over
SHOWN = 4  # runs that a message names
# What says where a run's data lie. The config.toml of an analysis, which has what its runs share, never has it.
_OF_A_RUN = "data_root"


def holds_run(path: Path) -> bool:
    """Whether a run lives in a folder; one whose ``config.toml`` says nothing counts, so that the fault is told."""
    try:
        settings = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
        return not settings or _OF_A_RUN in settings
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return True
    except OSError:
        return False


def runs_of(path: Path) -> list[Path]:
    """The run folders that a path stands for, in the order of their names.

    A run stands for itself, an analysis of ``engm reproduce`` for the runs that it was made from, and any other folder
    for all runs below it.
    """
    if holds_run(path):
        return [path]
    results = _results(path)
    if results.get("analysis") is not None:
        named = {record["folder"] for record in results["records"] if "folder" in record}
        return [folder for name in sorted(named) if holds_run(folder := path.parent / "runs" / name)]
    return sorted(file.parent for file in path.rglob("config.toml") if holds_run(file.parent))


def check_free_for_several(path: Path) -> None:
    """Looks whether a command that writes more than one run may write into a folder.

    Raises:
        ValueError: a run lives there, or the outcome of an analysis.
    """
    if path.is_file() or (path / "config.toml").is_file():
        raise ValueError(f"{path} {described(path)}, and cannot hold others as well: choose another --out")


def described(path: Path) -> str:
    """What a path is, to be put behind its name in a message that asks for something else."""
    if not path.exists():
        return "does not exist"
    if not path.is_dir():
        return "is a file"
    results = _results(path)
    runs = runs_of(path)
    shown = ", ".join(str(run) for run in runs[:SHOWN]) + (f" and {len(runs) - SHOWN} more" if runs[SHOWN:] else "")
    if runs == [path]:
        return "holds a run"
    if "analysis" in results or ((path / "config.toml").is_file() and (path.parent / "runs").is_dir()):
        where = f"; its runs are {shown}" if runs else ""
        return f"holds an analysis by engm reproduce, whose outcome is {path / 'table.md'}{where}"
    if (path / "times.json").is_file():
        return f"holds times of steps by engm reproduce table1, in {path / 'times.json'}"
    if "summaries" in results:
        return (
            f"holds a demonstration by engm demo, which keeps no networks; its figures are in {path / 'results.json'} "
            f"and {path / 'curves.png'}"
        )
    if runs:
        return f"holds {len(runs)} run{'s' if len(runs) > 1 else ''}: {shown}"
    return "holds no run" if any(path.iterdir()) else "is empty"


def _results(path: Path) -> dict[str, Any]:
    """What ``results.json`` says; nothing where it is missing or cannot be read."""
    try:
        found = json.loads((path / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
