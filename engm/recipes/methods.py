"""The outer optimizers by the names that commands take and the labels that tables print."""

from __future__ import annotations

from collections.abc import Sequence

from engm.checks import check_name

from .addresses import is_address, short_name

LABELS = {
    "msgd": "MSGD",
    "mgnc": "MGNC",
    "sngm": "SNGM",
    "f-engm": "F-ENGM",
    "n-engm": "N-ENGM",
    "a-engm": "A-ENGM",
    "engm": "ENGM",
}
"""All seven of the paper, in the order of its Table 1: name and label."""

METHOD_NAMES = tuple(LABELS)
_ALIASES = {"gnc": "mgnc", "fengm": "f-engm", "nengm": "n-engm", "aengm": "a-engm"}


def check_methods(names: Sequence[str]) -> None:
    """Looks the names up before anything is computed.

    Raises:
        ValueError: there is no name, an unknown one, or one twice.
    """
    if not names or any(name not in LABELS for name in names) or len(set(names)) < len(names):
        raise ValueError(f"expected different methods out of {', '.join(LABELS)}; got {', '.join(names) or 'none'}")


def canonical_method(name: str) -> str:
    """The name as :data:`LABELS` has it; upper case, ``_`` and names without a hyphen are understood.

    The address of an optimizer of one's own is its name.

    Raises:
        ValueError: the name is unknown; the message says which is nearest.
    """
    if is_address(name):
        return name.strip()
    typed = name.strip().lower().replace("_", "-")
    typed = _ALIASES.get(typed, typed)
    check_name(typed, METHOD_NAMES, what="optimizer")
    return typed


def label_of(name: str) -> str:
    """What tables print for a name of :func:`canonical_method`."""
    return short_name(name) if is_address(name) else LABELS[name]
