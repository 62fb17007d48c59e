"""Which arguments of users are refused, and with what error: names, alpha and other positive numbers."""

from __future__ import annotations

from cmath import isfinite
from collections.abc import Iterable
from difflib import get_close_matches
from math import nan
from typing import Any


def check_name(name: str, known: Iterable[str], *, what: str) -> None:
    """Refuses a name that is not known.

    Args:
        name: the name as typed.
        known: the known names.
        what: what the name should be the name of, for the message.

    Raises:
        ValueError: the name is not known; the message says which are nearest, and all of them if they are few.
    """
    names = list(known)
    if name in names:
        return
    near = get_close_matches(str(name).lower(), names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    everything = f" (known: {', '.join(names)})" if len(names) <= 40 else ""
    raise ValueError(f"unknown {what}: {name!r}{hint}{everything}")


class NonFiniteError(ValueError):
    """A loss or a gradient is infinite or NaN; nothing was changed."""


class RefusedError(RuntimeError):
    """Norms cannot be told of this network, or used in this way; the message names the place and says what to do."""


def check_alpha(alpha: Any) -> float:
    """``alpha`` as a positive float (``inf`` is allowed and clips nothing).

    Raises:
        ValueError: ``alpha`` is not a positive number.
    """
    try:
        value = float(alpha)
    except (TypeError, ValueError):
        raise ValueError(f"alpha must be a positive number, got {alpha!r}.") from None
    if not value > 0:
        raise ValueError(f"alpha must be positive, got {alpha!r}; engm.alpha_for(net) suggests one.")
    return value


def check_positive(name: str, value: float) -> float:
    """``value`` as a float.

    Raises:
        ValueError: ``value`` is not a positive finite number; the message names the argument.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = nan
    if not (isfinite(number) and number > 0):
        raise ValueError(f"{name} must be a positive and finite number, got {value!r}.")
    return number
