"""How settings and their values are spelled: the names of options, numbers, radii, lengths of time, channels."""

from __future__ import annotations

import re
from math import isfinite


def in_grey_levels(radius: float) -> str:
    """How to write a radius that was meant as so many grey levels of 0 to 255."""
    return f"For {radius:g} of the 255 grey levels write {radius:g}/255."


def shown_radius(radius: float) -> str:
    """A radius as it is written on the command line: ``8/255`` where it is a whole number of grey levels."""
    levels = round(radius * 255)
    return f"{levels}/255" if levels and abs(radius * 255 - levels) < 1e-6 else f"{radius:.4g}"


def option(name: str) -> str:
    """A setting as the command line spells it."""
    return "--" + name.replace("_", "-")


def parse_number(text: str | float) -> float:
    """A number, or a fraction such as ``8/255``.

    Raises:
        ValueError: neither.
    """
    try:
        top, _, bottom = str(text).partition("/")
        return float(top) / float(bottom) if bottom else float(top)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"expected a number or a fraction such as 8/255, got {text!r}") from None


def parse_duration(text: str) -> float:
    """Seconds of a time such as ``3h30m``, ``90m`` or ``1d12h``: days, hours, minutes, seconds, in this order.

    Raises:
        ValueError: it is none, or no time at all.
    """
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip().lower())
    parts = [] if found is None else [int(part or 0) for part in found.groups()]
    seconds = sum(count * size for count, size in zip(parts, (86400, 3600, 60, 1), strict=False))
    if not seconds:
        raise ValueError(f"--time-limit must be a time such as 3h30m, 90m or 45s, got {text!r}")
    return float(seconds)


def parse_normalization(text: str) -> tuple[list[float], list[float]] | None:
    """Means and deviations of ``0.49,0.48,0.45/0.25,0.24,0.26``; None for ``none`` and ``data``.

    Raises:
        ValueError: it is none of these.
    """
    if text in ("none", "data"):
        return None
    try:
        mean, std = ([float(part) for part in side.split(",")] for side in text.split("/"))
    except ValueError:
        mean, std = [], []
    if not (mean and len(mean) == len(std) and all(map(isfinite, (*mean, *std))) and min(std) > 0):
        raise ValueError(
            "--normalize must be none, data, or means and deviations of the channels as 0.49,0.48,0.45/0.25,0.24,0.26, "
            f"got {text!r}"
        )
    return mean, std
