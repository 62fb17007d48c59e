"""Settings as plain values: how TOML files and command lines name them, and how they are read and written."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from engm.checks import check_name

from .config import RunConfig, parse_number

# The first line of a file of resolved settings.
RESOLVED = "# Settings that nobody chose are worked out of the others, and anew where one of these is changed."


@cache
def value_type(name: str) -> tuple[Any, bool]:
    """The type of a setting without ``None``, and whether ``None`` is allowed."""
    hint = get_type_hints(RunConfig)[name]
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kinds = [part for part in parts if part is not type(None)]
    return kinds[0], len(parts) > len(kinds)


def from_values(values: Mapping[str, Any], *, source: str) -> RunConfig:
    """A configuration from plain values, as TOML has them: fractions as strings, lists for tuples.

    Args:
        values: values by name; both ``save_every`` and ``save-every`` are understood.
        source: where the values come from, for messages.

    Raises:
        ValueError: an unknown name (with the nearest known one), a wrong type or a value out of range.
    """
    known = tuple(f.name for f in fields(RunConfig))
    given: dict[str, Any] = {}
    for raw, value in values.items():
        name = raw.replace("-", "_")
        if isinstance(value, dict) and name not in known:
            raise ValueError(f"{source}: it has no tables; take the line [{raw}] out, and leave what is below it")
        check_name(name, known, what=f"setting in {source}")
        given[name] = _as_type(name, value, source)
    try:
        return RunConfig(**given)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _as_type(name: str, value: Any, source: str) -> Any:
    kind, optional = value_type(name)
    if value is None and optional:
        return None
    if kind is float and (isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))):
        try:
            return parse_number(value)
        except ValueError as error:
            raise ValueError(f"{source}: {name}: {error}") from None
    if name == "alpha" and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if get_args(kind):  # tuple[int, ...] or tuple[str, ...]
        inner = get_args(kind)[0]
        if isinstance(value, list | tuple) and all(type(entry) is inner for entry in value):
            return tuple(value)
        raise ValueError(f"{source}: {name} must be a list of {inner.__name__}, got {value!r}")
    if type(value) is not kind:
        raise ValueError(f"{source}: {name} must be {kind.__name__}, got {value!r}")
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """The settings that a TOML file names, as plain values.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no TOML.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file at {path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error


def to_toml(config: RunConfig) -> str:
    """A TOML file that :func:`from_values` reads back to the same configuration."""
    import tomli_w  # imported here, because only a run that begins needs it

    return f"{RESOLVED}\n{tomli_w.dumps(config.as_dict())}"


def is_resolved(path: Path) -> bool:
    """Whether a file was written by :func:`to_toml`, so that not all that it says was chosen."""
    return path.read_text(encoding="utf-8").startswith(RESOLVED)
