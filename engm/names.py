"""Names that users type: looked up once, and refused with the nearest known one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def check_name(name: str, known: Iterable[str], *, what: str) -> None:
    """Refuses a name that is not known.

    Args:
        name: as typed.
        known: what there is.
        what: what it should be the name of, for the message.

    Raises:
        ValueError: not known; says which are nearest, and all of them if they are few.
    """
    names = list(known)
    if name in names:
        return
    near = get_close_matches(str(name).lower(), names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    everything = f" (known: {', '.join(names)})" if len(names) <= 40 else ""
    raise ValueError(f"unknown {what}: {name!r}{hint}{everything}")
