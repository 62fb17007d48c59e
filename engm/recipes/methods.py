"""The outer optimizers by the names that the command line takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import engm

Factory = Callable[["engm.GradNormModule", torch.optim.Optimizer, float, int], torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """An outer optimizer.

    Attributes:
        label: as the paper's tables print it.
        make: ``(model, inner optimizer, alpha, tau) -> optimizer``; ``alpha`` is ENGM's, in units of a parameter
            gradient's norm, ``tau`` A-ENGM's steps between two regressions; the others ignore what is not theirs.
    """

    label: str
    make: Factory


METHODS: dict[str, Method] = {
    "msgd": Method("MSGD", lambda model, sgd, alpha, tau: engm.MSGD(model, sgd)),
    # The threshold on input gradients is ENGM's over gamma_1, which the paper's 5 and 0.5 put at ten.
    "nengm": Method("N-ENGM", lambda model, sgd, alpha, tau: engm.NENGM(model, sgd, alpha / 10)),
    "aengm": Method("A-ENGM", lambda model, sgd, alpha, tau: engm.AENGM(model, sgd, alpha, tau=tau)),
    "engm": Method("ENGM", lambda model, sgd, alpha, tau: engm.ENGM(model, sgd, alpha)),
}


def check_methods(names: tuple[str, ...]) -> None:
    """Looks the names up before anything is computed.

    Raises:
        ValueError: none at all, an unknown one, or one twice.
    """
    unknown = [name for name in names if name not in METHODS]
    if not names or unknown or len(set(names)) < len(names):
        raise ValueError(f"expected different methods out of {', '.join(METHODS)}; got {', '.join(names) or 'none'}")
