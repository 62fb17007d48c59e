"""What an analysis comes to, and the files it is written to: JSON, CSV, a Markdown table, a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pictures import picture
from ..storage.atomic_files import write_json, write_text_atomic
from .statistics import Finding

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Rows of text under headings.

    Attributes:
        caption: how to read the table.
        headings: headings of the columns.
        rows: cells of the rows, as many as there are columns.
        words: headings of columns of words, which begin at the left as the first column does; the others are numbers.
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[str] = ()

    def markdown(self) -> str:
        """The table in Markdown, its caption above it."""
        rules = ["---" if heading in (self.headings[0], *self.words) else "---:" for heading in self.headings]
        lines = ["| " + " | ".join(self.headings) + " |", "|" + "|".join(rules) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([self.caption, "", *lines]) + "\n"


@dataclass(frozen=True)
class Outcome:
    """What an analysis comes to.

    Attributes:
        tables: measured beside published.
        findings: the paper's claims, one by one.
        rows: the figures one by one, for the CSV file: the same keys in all.
        draw: puts the picture into an empty figure.
        size: width and height of the figure in inches.
    """

    tables: Sequence[Table]
    findings: Sequence[Finding]
    rows: Sequence[dict[str, Any]]
    draw: Callable[[Figure], None]
    size: tuple[float, float] = field(default=(10.0, 4.0))

    def markdown(self) -> str:
        """Tables and findings in Markdown."""
        parts = [table.markdown() for table in self.tables]
        if self.findings:
            parts.append(findings_table(self.findings))
        return "\n".join(parts)


def findings_rows(findings: Sequence[Finding]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows of a table of findings."""
    return ("the paper", "measured", "verdict"), [(f.claim, f.measured, f.verdict) for f in findings]


def findings_table(findings: Sequence[Finding]) -> str:
    """The findings as a table in Markdown."""
    headings, rows = findings_rows(findings)
    marked = [(claim, measured, f"**{verdict}**") for claim, measured, verdict in rows]
    return Table("What the paper says, and what these runs say:", headings, marked).markdown()


def write_outcome(outcome: Outcome, folder: Path, document: dict[str, Any], heading: str) -> None:
    """Writes ``results.json``, ``table.csv``, ``table.md`` and the picture, ``picture.png``, ``.svg`` and ``.pdf``.

    Args:
        outcome: what the analysis came to.
        folder: a folder that exists.
        document: everything that the outcome was made from.
        heading: first lines of the Markdown file.

    Raises:
        OSError: a file could not be written; the others are whole.
    """
    write_json(folder / "results.json", document)
    text = io.StringIO()
    if outcome.rows:
        writer = csv.DictWriter(text, list(outcome.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(outcome.rows)
    write_text_atomic(folder / "table.csv", text.getvalue())
    write_text_atomic(folder / "table.md", f"{heading}\n\n{outcome.markdown()}")
    save_picture(outcome, folder / "picture")


def save_picture(outcome: Outcome, path: Path) -> None:
    """Draws the outcome's picture.

    Args:
        outcome: what an analysis came to.
        path: as :func:`engm.recipes.pictures.picture` takes it.

    Raises:
        OSError: it could not be written.
    """
    with picture(path, outcome.size) as drawn:
        outcome.draw(drawn)
