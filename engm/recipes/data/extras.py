"""Packages that only some data sets need."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_extra(module: str, purpose: str) -> Any:
    """Imports a module of the extra ``engm[recipes]``.

    Args:
        module: its full name.
        purpose: what needs it, for the message.

    Raises:
        ModuleNotFoundError: its package, or one that it needs, is not installed; says how to install them.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{purpose} need {error.name}: pip install 'engm[recipes]'", name=error.name
        ) from error
