"""Which data does a text name, and how is it written so that it is found again? Needs no torch and reads no file."""

from __future__ import annotations

from pathlib import Path

from .addresses import SOURCES, is_address, settled

DATASETS = ("digits", "cifar10", "cifar100", "svhn", "tiny-imagenet")


def known_data(spec: str) -> str | None:
    """The name of a data set as we write it; ``None`` if it is none."""
    squeezed = spec.strip().lower().replace("-", "").replace("_", "")
    return next((name for name in DATASETS if name.replace("-", "") == squeezed), None)


def names_source(spec: str) -> bool:
    """Whether a text begins with one of the sources and a colon."""
    return spec.partition(":")[0].strip().lower() in SOURCES and ":" in spec


def names_place(spec: str) -> bool:
    """Whether a text is the path of a file or folder, whose images stay the same when it is moved."""
    return known_data(spec) is None and not names_source(spec) and not is_address(spec)


def settled_data(spec: str) -> str:
    """A ``spec`` that is found again from another working directory: with absolute paths."""
    path = Path(spec).expanduser()
    if known_data(spec) is None and path.exists():
        return str(path.absolute())
    return _settled_source(spec) if names_source(spec) else settled(spec)


def _settled_source(spec: str) -> str:
    """The same with the absolute path where the name is that of a folder which is there."""
    source, _, name = spec.partition(":")
    path = Path(name.strip()).expanduser()
    return f"{source.strip().lower()}:{path.absolute() if path.is_dir() else name.strip()}"
