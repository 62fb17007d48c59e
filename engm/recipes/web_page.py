"""A page of HTML that stands alone: its look, and the parts that reports put on it (text, tables, pictures).

Everything that a part is given is text and is escaped. Pictures are SVG within the page; nothing is fetched from
elsewhere, which the page forbids its browser too, and nothing needs a script.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .pictures import inline_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --line: #d0d0d0; --soft: #f4f4f4; --ink: #1b1b1b; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --line: #4a4a4a; --soft: #262626; --ink: #e4e4e4; --paper: #171717; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
nav ul { columns: 18rem; padding-left: 1.2rem; }
a { color: inherit; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
.caption { font-size: 0.875rem; margin: 1.5rem 0 -0.6rem; max-width: 60rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child, table.text td, table.text th { text-align: left; }
td:last-child { min-width: 5rem; }
table:not(.text) td:not(:first-child) { white-space: nowrap; }
thead th { background: var(--soft); }
figure { margin: 1.5rem 0; padding: 0.6rem; border: 1px solid var(--line); background: #ffffff; overflow-x: auto; }
figure svg { display: block; width: 100%; height: auto; min-width: 34rem; }
details { margin: 1rem 0; }
summary { cursor: pointer; }
code { background: var(--soft); padding: 0 0.25rem; }
@media print { body { max-width: none; } details > * { display: block; } figure, tr { break-inside: avoid; } }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page.

    Args:
        title: its title and first heading.
        parts: HTML that the functions below made.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def section(title: str, name: str = "") -> str:
    """The heading of a section; with a name it can be linked to."""
    place = f' id="{escape(name)}"' if name else ""
    return f"<h2{place}>{escape(title)}</h2>"


def contents(sections: Mapping[str, str]) -> str:
    """Links to sections, by name and title."""
    links = "".join(f'<li><a href="#{escape(name)}">{escape(title)}</a></li>' for name, title in sections.items())
    return f"<nav><ul>{links}</ul></nav>"


def paragraph(text: str) -> str:
    """A paragraph, in which `backticks` are code."""
    return f"<p>{_text(text)}</p>"


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "", *, text: bool = False) -> str:
    """A table.

    Args:
        headings: headings of the columns.
        rows: cells of the rows, as many as there are columns.
        caption: how to read the table.
        text: whether the cells are words, which stand to the left; numbers stand to the right.
    """
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in headings)
    body = "\n".join("<tr>" + "".join(f"<td>{_text(shown(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    above = f'<p class="caption">{_text(caption)}</p>' if caption else ""
    kind = ' class="text"' if text else ""
    content = f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>"
    return f'{above}<div class="scroll"><table{kind}>{content}</table></div>'


def folded(title: str, parts: Sequence[str]) -> str:
    """Parts that are shown when their title is clicked."""
    return f"<details><summary>{escape(title)}</summary>\n" + "\n".join(parts) + "\n</details>"


def picture_part(number: int, size: tuple[float, float], draw: Callable[[Figure], None], description: str) -> str:
    """A picture.

    Args:
        number: of the picture on its page, which keeps the names inside of several apart.
        size: width and height in inches.
        draw: puts the picture into an empty figure.
        description: what is to be seen, for those who do not see it.
    """
    written: list[str] = []
    with inline_svg(size, written) as figure:
        draw(figure)
    return f'<figure role="img" aria-label="{escape(description)}">\n{_within_html(written[0], number)}\n</figure>'


def shown(value: Any) -> str:
    """A value as a cell shows it: numbers with six digits, lists with commas, nothing for ``None``."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return str(value)


def _text(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _within_html(svg: str, number: int) -> str:
    """An SVG file's element without prolog, name spaces and metadata, and with names that no other picture has."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, count=1, flags=re.DOTALL)
    element = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", element)
    element = re.sub(r'\bid="', f'id="p{number}-', element)
    element = re.sub(r'href="#', f'href="#p{number}-', element)
    return re.sub(r"url\(#", f"url(#p{number}-", element).strip()
