"""Carrying an analysis out: its cells one after the other or several at once, then its tables and pictures."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ..config import to_toml
from ..machine import machine_facts
from ..run_folder import View
from ..storage.atomic_files import make_folder, write_text_atomic
from .analysis import Analysis, Request
from .cells import Cell
from .outcome import Outcome, write_outcome
from .statistics import Record

RUNS = "runs"


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
        analysis: which.
        request: how.
        cells: of the analysis.
        out: gets ``runs/`` (run folders, shared by analyses) and a folder of the analysis's name, with
            ``config.toml``, ``results.json``, ``table.csv``, ``table.md`` and ``picture.png``.
        device: where to compute.
        jobs: cells at once; with several, each in a process of its own.
        view: makes who watches a cell, if there is one at a time.
        on_cell: called with every finished record and the number of finished cells.

    Raises:
        ValueError, FileNotFoundError, OSError: as :func:`engm.recipes.run_folder.train`. What was finished is kept, and
            the same call goes on.
    """
    runs, folder = out / RUNS, out / analysis.name
    make_folder(runs)
    make_folder(folder)
    write_text_atomic(folder / "config.toml", to_toml(cells[0].config.resolved()))
    if jobs == 1:
        records = _in_turn(cells, runs, device, view, on_cell)
    else:
        records = _at_once(cells, runs, device, jobs, on_cell)
    document = {
        "format": 1,
        "analysis": analysis.name,
        "title": analysis.title,
        "budget": request.budget.name,
        "purpose": request.budget.purpose,
        "seeds": list(request.seeds),
        "settings": {k: v for k, v in request.settings.items() if k not in ("data", "data_root")},
        "machine": machine_facts(device),
        "records": records,
    }
    outcome = analysis.summarise(records)
    write_outcome(outcome, folder, document, heading(document))
    return outcome


def heading(document: dict[str, Any]) -> str:
    """The first lines of an analysis's page."""
    lost = [record["name"] for record in document["records"] if "diverged" in record]
    lines = [
        f"# {document['title']}",
        "",
        f"`engm reproduce {document['analysis']} --budget {document['budget']}`: {document['purpose']}. "
        f"Seeds {', '.join(map(str, document['seeds']))}; {_machine(document['machine'])}.",
    ]
    if document["settings"]:
        lines.append("Other settings: " + ", ".join(f"{k} {v}" for k, v in document["settings"].items()) + ".")
    if lost:
        lines.append(f"Diverged, and not in the means: {', '.join(lost)}.")
    return "\n".join(lines)


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


def _at_once(
    cells: Sequence[Cell], runs: Path, device: torch.device, jobs: int, on_cell: Callable[[Record, int], None]
) -> list[Record]:
    """In the order of the cells, whichever is finished first."""
    # Two analyses' cells may be the same run: whoever comes second would find the folder in use.
    groups: dict[str, list[int]] = {}
    for index, cell in enumerate(cells):
        groups.setdefault(cell.folder_name, []).append(index)
    records: dict[int, Record] = {}
    with ProcessPoolExecutor(min(jobs, len(groups)), mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(_work, [cells[k] for k in group], runs, str(device)): group for group in groups.values()}
        try:
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    for index, record in zip(waiting.pop(future), future.result(), strict=True):
                        records[index] = record
                        on_cell(record, len(records))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [records[index] for index in range(len(cells))]


def _work(cells: Sequence[Cell], runs: Path, device: str) -> list[Record]:
    """In a process of its own."""
    return [cell.run(runs, torch.device(device)) for cell in cells]
