"""Lets the pages of the site be the files of the repository: links between them hold in both places.

This is a hook of mkdocs. README.md is the first page; what pages link to outside of docs/ (scripts, pictures, results)
is copied beside them. Links to nothing stay as they are, for mkdocs to complain of.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
COPIES = "repository"  # where the site keeps what lies outside of docs/
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)")
OUTSIDE = {  # pages of the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "csrc/README.md": "csrc.md",
    "benchmarks/evidence/protocol.md": "results/protocol.md",
    "benchmarks/results/h200/README.md": "results/h200.md",
}
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside of docs/, and a page of all examples."""
    for path, place in OUTSIDE.items():
        files.append(File.generated(config, place, content=(ROOT / path).read_text()))
    files.append(File.generated(config, "examples.md", content=examples()))
    return files


def examples() -> str:
    """Every script of examples/, whole."""
    scripts = sorted((ROOT / "examples").glob("*.py"))
    return "# Examples\n\n" + "\n\n".join(f"## {path.name}\n\n```python\n{path.read_text()}```" for path in scripts)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links where the site has their targets."""
    source = page.file.src_uri
    origin = {place: path for path, place in OUTSIDE.items()} | {"examples.md": "examples.md"}
    folder = posixpath.dirname(origin.get(source, posixpath.join("docs", source)))

    def on_site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if not (ROOT / target).exists():
            return match[1]
        if target in OUTSIDE:
            place = OUTSIDE[target]
        elif target == "examples":
            place = "examples.md"
        elif target.startswith("docs/"):
            place = target.removeprefix("docs/")
        else:
            place = f"{COPIES}/{target}" + (".txt" if target.endswith(".md") else "")  # it is no page of the site
            if files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / target)))
        return posixpath.relpath(place, posixpath.dirname(source) or ".")

    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(on_site, part) for part in parts[::2]]
    return "".join(parts)
