"""Packages that only some data sets need."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_extra(module: str, purpose: str, *, extra: str = "recipes") -> Any:
    """Imports a module of an extra, ``engm[recipes]`` say.

    Args:
        module: its full name.
        purpose: what needs it, for the message.
        extra: name of the extra that has its package.

    Raises:
        ModuleNotFoundError: its package, or one that it needs, is not installed; says how to install them.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{purpose} need {error.name}: pip install 'engm[{extra}]'", name=error.name
        ) from error
