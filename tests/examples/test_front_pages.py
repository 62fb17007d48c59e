"""The README stays one page whose figures say where they come from; the architecture page names what is there."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import engm
from engm.rules import base

ROOT = Path(__file__).resolve().parents[2]
README, ARCHITECTURE = ROOT / "README.md", ROOT / "docs" / "architecture.md"
PAGES = [README, ROOT / "csrc" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FIGURE = re.compile(r"\|\s*\**(\?\?|\d+\.\d+( ± \d+\.\d+)?)\**\s*(?=\|)")
MOST_LINES = 130


def tables_without_command(text: str) -> list[str]:
    """First lines of the tables of figures that no comment with a command of this repository stands right above."""
    found, above = [], ""
    for is_table, lines in groupby(text.splitlines(), key=lambda line: line.startswith("|")):
        part = "\n".join(lines)
        if is_table and FIGURE.search(part):
            comment = above.rpartition("<!--")[2].rstrip() if above.rstrip().endswith("-->") else ""
            scripts = re.findall(r"python (\S+\.py)", comment)
            if not scripts or not all((ROOT / script).is_file() for script in scripts):
                found.append(part.partition("\n")[0])
        above = part
    return found


def test_the_readme_is_one_page() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_every_table_of_figures_in_the_readme_has_its_command() -> None:
    text = README.read_text(encoding="utf-8")
    assert FIGURE.search(text)
    assert not tables_without_command(text)


@pytest.mark.parametrize("comment", ["", "<!-- python benchmarks/nobody.py -->", "<!-- measured -->", "text -->"])
def test_a_table_without_a_command_would_be_noticed(comment: str) -> None:
    assert tables_without_command(f"{comment}\n\n| a | b |\n|---|---|\n| ENGM | **1.08** |\n") == ["| a | b |"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if not re.match(r"[a-z]+:", t) and not (page.parent / t).exists()]
    assert not missing


def blocks(page: Path) -> list[Any]:
    found = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [pytest.param(block, id=f"{page.stem}-{number}") for number, block in enumerate(found)]


@pytest.mark.parametrize("block", blocks(README) + blocks(ARCHITECTURE))
def test_code_runs(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    model = engm.GradNormModule(net)
    names: dict[str, Any] = {
        "engm": engm, "torch": torch, "nn": nn, "F": F, "net": net, "model": model,
        "x": torch.rand(8, 3, 8, 8), "x_adv": torch.rand(8, 3, 8, 8), "y": torch.randint(10, (8,)),
        "sgd": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    }  # fmt: skip
    before = [parameter.detach().clone() for parameter in net.parameters()]
    exec(block, names)
    changed = any(not torch.equal(b, p) for b, p in zip(before, net.parameters(), strict=True))
    assert changed == ("opt.step()" in block)


def test_there_are_blocks() -> None:
    assert len(blocks(README)) >= 1
    assert len(blocks(ARCHITECTURE)) >= 2


def test_files_that_the_architecture_names_are_there() -> None:
    """Also those in plain code: from the root of the repository, of the package or of its recipes."""
    named = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|cpp|md|h|yml))`", ARCHITECTURE.read_text(encoding="utf-8")))
    assert len(named) > 20
    places = [ROOT, *(path.parent for path in (ROOT / "engm").rglob("*.py")), ROOT / "engm", *ROOT.glob("tests/**/")]
    assert not [name for name in named if not any((place / name).is_file() for place in places)]


def test_names_that_the_architecture_follows_a_step_by_are_there() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    named = {name.split(".")[-1] for name in re.findall(r"`([A-Za-z_](?:[\w.]*\w)?)(?:\(.*?\))?`", text)}
    sources = [path.read_text(encoding="utf-8") for top in ("engm", "tests") for path in (ROOT / top).rglob("*.py")]
    words = set(re.findall(r"\w+", "\n".join(sources)))
    assert len(named) > 60
    assert not sorted(named - words - {"cpp", "md", "yml", "py"})
