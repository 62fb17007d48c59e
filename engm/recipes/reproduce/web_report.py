"""A report as one web page that stands alone: analyses of ``engm reproduce``, and runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runs.contents import runs_of
from ..runs.web_report import run_parts
from ..storage.atomic_files import read_json, write_text_atomic
from ..web_page import contents, folded, page, paragraph, picture_part, section, table
from .outcome import findings_rows
from .page import outcome_of
from .registry import ANALYSES
from .sweep import description


def analyses_in(paths: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """The results of analyses by their folder: the paths themselves, and what lies right below them."""
    found: dict[Path, dict[str, Any]] = {}
    for path in paths:
        for folder in (path, *(path / name for name in ANALYSES)):
            file = folder / "results.json"
            document = read_json(file) if file.is_file() else {}
            if isinstance(document, dict) and document.get("analysis") in ANALYSES:
                found[folder] = document
    return found


def without_runs(paths: Sequence[Path], analyses: dict[Path, dict[str, Any]]) -> list[Path]:
    """Those of the paths whose analyses are all that there is: their runs were not kept, or they train nothing."""
    known = {*analyses, *(folder.parent for folder in analyses)}
    return [path for path in paths if path in known and not runs_of(path)]


def write_report(
    path: Path, results: Sequence[dict[str, Any]], unfinished: Sequence[Path], analyses: dict[Path, dict[str, Any]]
) -> None:
    """Writes the page.

    Args:
        path: file to write, in a folder that exists; one that is there is replaced.
        results: from :func:`engm.recipes.runs.report.collect`.
        unfinished: likewise.
        analyses: from :func:`analyses_in`.

    Raises:
        OSError: it could not be written.
    """
    parts, sections = [], {}
    for number, document in enumerate(analyses.values(), 1):
        name = f"analysis-{number}"
        sections[name] = document["title"]
        parts += _analysis_parts(document, name, number)
    if results:
        sections["runs"] = "Runs"
        parts += [section("Runs", "runs"), *run_parts(results, unfinished, len(analyses) + 1)]
    links = [contents(sections)] if len(sections) > 1 else []
    write_text_atomic(path, page(_title(results, analyses), [*links, *parts]))


def _title(results: Sequence[dict[str, Any]], analyses: dict[Path, dict[str, Any]]) -> str:
    """The one analysis, that there are several, or the methods of the runs."""
    if len(analyses) > 1:
        return "Figures and tables of the paper, repeated"
    if analyses:
        return str(next(iter(analyses.values()))["title"])
    data = dict.fromkeys(result["data"].get("name", "") for result in results)
    methods = ", ".join(dict.fromkeys(result["method"] for result in results))
    return f"{methods} on {' and '.join(filter(None, data))}" if any(data) else methods


def _analysis_parts(document: dict[str, Any], name: str, number: int) -> list[str]:
    outcome = outcome_of(document)
    draw = picture_part(
        number, outcome.size, outcome.draw, f"{document['title']}; the numbers are in the tables below."
    )
    parts = [section(document["title"], name), *map(paragraph, description(document)), draw]
    parts += [table(shown.headings, shown.rows, shown.caption) for shown in outcome.tables]
    if outcome.findings:
        headings, rows = findings_rows(outcome.findings)
        parts.append(table(headings, rows, "What the paper says, and what these runs say:", text=True))
    if outcome.rows:
        columns = list(outcome.rows[0])
        lines = [[row[key] for key in columns] for row in outcome.rows]
        parts.append(folded("The figures one by one", [table(columns, lines)]))
    return parts
