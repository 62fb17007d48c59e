"""Carrying an analysis out: its cells one after the other or several at once, then its tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engm.checks import NonFiniteError

from ..storage.atomic_files import make_folder, write_text_atomic
from .analysis import Analysis, Request
from .cells import Cell
from .outcome import Outcome, write_outcome
from .statistics import Record
from .workers import at_once

if TYPE_CHECKING:
    import torch

    from ..runs.view import View

RUNS = "runs"
PLACES = ("data", "data_root")  # settings that say where something lies on this machine


def carry_out(
    analysis: Analysis,
    request: Request,
    cells: Sequence[Cell],
    out: Path,
    device: torch.device,
    *,
    jobs: int,
    view: Callable[[str], AbstractContextManager[View]],
    on_cell: Callable[[Record, int], None],
) -> Outcome:
    """Computes what is missing, and writes the analysis's folder.

    Args:
        analysis: the figure or table.
        request: what the user asks for.
        cells: the cells of the analysis.
        out: gets ``runs/`` (run folders, shared by analyses) and a folder of the analysis's name, with
            ``config.toml`` (what all cells share), ``results.json``, ``table.csv``, ``table.md`` and the picture
            (``picture.png``, ``.svg``, ``.pdf``).
        device: where to compute.
        jobs: number of cells at once; several run in a process of their own each.
        view: makes who watches a cell, if there is one at a time.
        on_cell: called with every finished record and the number of finished cells.

    Raises:
        NonFiniteError: every run diverged.
        ValueError, FileNotFoundError, OSError: as :func:`engm.recipes.runs.folder.train`. What was finished is kept,
            and the same call goes on.
    """
    runs, folder = out / RUNS, out / analysis.name
    make_folder(folder)
    write_text_atomic(folder / "config.toml", _common(cells))
    records = compute(cells, runs, device, jobs=jobs, view=view, on_cell=on_cell)
    if all("diverged" in record for record in records):
        raise NonFiniteError(f"every run of {analysis.name} diverged")
    document = {
        "format": 1,
        "analysis": analysis.name,
        "title": analysis.title,
        "budget": request.budget.name,
        "purpose": request.budget.purpose,
        "settings": {k: v for k, v in request.settings.items() if k not in PLACES},
        "records": records,
    }
    outcome = analysis.summarise(records)
    write_outcome(outcome, folder, document, heading(document))
    return outcome


def compute(
    cells: Sequence[Cell],
    runs: Path,
    device: torch.device,
    *,
    jobs: int,
    view: Callable[[str], AbstractContextManager[View]],
    on_cell: Callable[[Record, int], None],
) -> list[Record]:
    """The records of cells, in their order; what is finished is read.

    Args:
        cells: of one analysis or of several.
        runs: the folder of run folders, which is made.
        device: as :func:`carry_out` takes it, and so are the others.
        jobs: number of cells at once.
        view: makes who watches a cell.
        on_cell: called with every finished record.
    """
    make_folder(runs)
    if jobs == 1:
        return _in_turn(cells, runs, device, view, on_cell)
    return at_once(cells, runs, device, jobs, on_cell)


def shared_cells(analyses: Sequence[Sequence[Cell]]) -> list[Cell]:
    """The cells of several analyses, each run with each set of measures once, without those that want to be alone."""
    every = {(cell.folder_name, cell.measures): cell for cells in analyses for cell in cells if not cell.alone}
    return list(every.values())


def _common(cells: Sequence[Cell]) -> str:
    """The settings that all cells share, as TOML, without the places of data on this machine."""
    import tomli_w  # imported here, because nothing else needs it

    first, *others = [cell.config.resolved().as_dict() for cell in cells]
    shared = {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}
    return tomli_w.dumps({k: v for k, v in shared.items() if k not in PLACES})


def heading(document: dict[str, Any]) -> str:
    """The first lines of an analysis's page, in Markdown."""
    return "\n".join([f"# {document['title']}", "", *description(document)])


def description(document: dict[str, Any]) -> list[str]:
    """What an analysis is of: command, seeds, machine, other settings, runs that diverged; a sentence or two each."""
    seeds = sorted({record["labels"]["seed"] for record in document["records"]})
    machines = dict.fromkeys(_machine(r["machine"]) for r in document["records"] if "machine" in r)
    lost = [record["name"] for record in document["records"] if "diverged" in record]
    lines = [
        f"`engm reproduce {document['analysis']} --budget {document['budget']}`: {document['purpose']}. "
        f"Seeds {', '.join(map(str, seeds))}; computed on {' and '.join(machines)}.",
    ]
    if document["settings"]:
        lines.append("Other settings: " + ", ".join(f"{k} {v}" for k, v in document["settings"].items()) + ".")
    if lost:
        lines.append(f"Diverged, and not in the means: {', '.join(lost)}.")
    return lines


def _machine(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)


def _in_turn(
    cells: Sequence[Cell],
    runs: Path,
    device: torch.device,
    view: Callable[[str], AbstractContextManager[View]],
    on_cell: Callable[[Record, int], None],
) -> list[Record]:
    records = []
    for cell in cells:
        records.append(cell.run(runs, device, lambda name=cell.name: view(name)))  # type: ignore[misc]
        on_cell(records[-1], len(records))
    return records
