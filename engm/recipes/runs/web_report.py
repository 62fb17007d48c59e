"""The part of a report's web page that is about runs: table, pictures, evaluations, settings, versions, epochs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from os.path import commonpath
from pathlib import Path
from typing import Any

from ..config import RunConfig, option
from ..storage.atomic_files import read_object
from ..web_page import folded, paragraph, picture_part, section, shown, table
from .curves import draw_into, size_of
from .folder import RunFolder
from .report import caption, grid

ALWAYS = (
    "data", "model", "objective", "threat", "eps", "attack_steps", "optimizer", "alpha", "lr", "epochs", "batch_size",
    "seed",
)  # fmt: skip
"""Settings that are shown at their defaults, too."""
PLACES = ("data_root",)  # settings that say where something lies on this machine


def run_parts(results: Sequence[dict[str, Any]], unfinished: Sequence[Path], number: int) -> list[str]:
    """The parts of a page.

    Args:
        results: from :func:`engm.recipes.runs.report.collect`.
        unfinished: likewise.
        number: of the next picture on the page.
    """
    names = dict(zip((result["folder"] for result in results), _names(results), strict=True))
    parts = [table(*grid(results), caption(results))]
    if unfinished:
        parts.append(paragraph(f"Not finished, so not shown: {', '.join(path.name for path in unfinished)}."))
    parts.append(
        picture_part(
            number,
            size_of(results),
            partial(draw_into, results),
            "Learning curves, the mean over seeds with a band of one standard deviation, and robust accuracies on the "
            "test set; the numbers are in the tables of this page.",
        )
    )
    parts += _evaluations(results, names)
    parts += _settings(results, names)
    machines = [(names[result["folder"]], result["machine"]) for result in results]
    parts.append(section("Machine and versions"))
    parts.append(_differing("run", machines))
    parts.append(section("Every epoch"))
    parts += [folded(names[result["folder"]], [_epochs(result["history"])]) for result in results]
    return parts


def _names(results: Sequence[dict[str, Any]]) -> list[str]:
    """The folders of the runs from the one that holds them all: a page says nothing of where they lie here."""
    folders = [str(Path(result["folder"]).absolute()) for result in results]
    root = Path(commonpath([str(Path(folder).parent) for folder in folders]))
    return [str(Path(folder).relative_to(root)) for folder in folders]


def _evaluations(results: Sequence[dict[str, Any]], names: dict[str, str]) -> list[str]:
    """What ``engm evaluate`` found, where it was called."""
    rows: list[tuple[str, str, str, dict[str, Any]]] = []
    for result in results:
        file = RunFolder(Path(result["folder"])).evaluations_file
        for checkpoint, attacks in (read_object(file) if file.is_file() else {}).items():
            for attack, entries in attacks.items():
                rows += [(names[result["folder"]], checkpoint, attack, entry) for entry in entries]
    if not rows:
        return []
    columns = list(dict.fromkeys(key for *_, entry in rows for key, value in entry.items() if _is_plain(value)))
    lines = [[name, checkpoint, attack, *map(entry.get, columns)] for name, checkpoint, attack, entry in rows]
    return [
        section("Evaluations"),
        table(["run", "checkpoint", "attack", *columns], lines, "By `engm evaluate`; accuracies are fractions."),
    ]


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float)


def _settings(results: Sequence[dict[str, Any]], names: dict[str, str]) -> list[str]:
    """The settings that all runs share, those that differ, and behind a click the defaults among the former."""
    configs = [(names[result["folder"]], _told(result["config"])) for result in results]
    first, plain = configs[0][1], RunConfig().as_dict()
    shared = {key: value for key, value in first.items() if all(c.get(key) == value for _, c in configs)}
    chosen = {key: value for key, value in shared.items() if key in ALWAYS or key not in plain or plain[key] != value}
    others = {key: value for key, value in shared.items() if key not in chosen}
    parts = [section("Settings")]
    differing = [(name, {k: v for k, v in config.items() if k not in shared}) for name, config in configs]
    if any(found for _, found in differing):
        parts.append(_differing("run", differing))
    parts.append(table(("setting", "value"), _options(chosen), "Of all runs.", text=True))
    parts.append(
        folded("Settings that are at their default", [table(("setting", "value"), _options(others), text=True)])
    )
    return parts


def _told(config: dict[str, Any]) -> dict[str, Any]:
    told = {key: value for key, value in config.items() if key not in PLACES}
    return told | {"data": Path(config["data"]).name} if "data" in config else told


def _options(settings: dict[str, Any]) -> list[tuple[str, str]]:
    return [(option(key), shown(value) or "-") for key, value in settings.items()]


def _differing(first: str, found: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A table with a row for each of several things, or one for all of them where they are the same."""
    columns = _keys(values for _, values in found)
    rows = [(name, *map(values.get, columns)) for name, values in found]
    if len({row[1:] for row in map(_hashable, rows)}) == 1:
        rows = [("all", *rows[0][1:])]
    return table([first, *columns], rows, text=True)


def _hashable(row: Sequence[Any]) -> tuple[str, ...]:
    return tuple(map(repr, row))


def _keys(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _epochs(history: Sequence[dict[str, Any]]) -> str:
    columns = [key for key in _keys(history) if any(_is_plain(row.get(key)) for row in history)]
    return table(columns, [[row.get(key) for key in columns] for row in history])
