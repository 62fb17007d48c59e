"""Every ``engm`` command in README and docs names commands and options that there are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from engm.recipes.cli import app

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"^\s*(?:engm|torchrun .* -m engm\.recipes) (?P<rest>[a-z].*)$")


def code_lines(page: Path) -> Iterator[str]:
    """What is indented or fenced."""
    fenced = False
    for line in page.read_text(encoding="utf-8").splitlines():
        fenced ^= line.startswith("```")
        if fenced or line.startswith("    "):
            yield line


COMMANDS = [
    (page.name, match["rest"].partition("#")[0].strip())
    for page in PAGES
    for line in code_lines(page)
    if (match := COMMAND.match(line))
]


def test_there_are_some() -> None:
    assert {"train", "evaluate", "compare", "report", "export", "doctor", "demo", "reproduce"} <= {
        command.split()[0] for _, command in COMMANDS
    }


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: value.replace("/", "|"))
def test_it_can_be_parsed(page: str, command: str) -> None:
    name, *arguments = [word for word in shlex.split(command) if word != "..."]
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert name in known, f"{page}: engm {command}"
    known[name].make_context(name, arguments)  # raises for an option or a value that it does not take
