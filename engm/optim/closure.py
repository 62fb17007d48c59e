"""Which inner optimizers evaluate the loss themselves, by a closure, and what is asked of it?"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import Parameter, signature
from typing import Any, NoReturn

import torch

BY_HAND = "closure calls opt.zero_grad(), computes the losses, calls opt.backward(losses) and returns losses.mean()"


@cache
def needs_closure(step: Callable[..., Any]) -> bool:
    """Whether this ``step`` of an optimizer's class cannot do without a closure, as :class:`torch.optim.LBFGS`'s."""
    parameter = signature(step).parameters.get("closure")
    return parameter is not None and parameter.default is Parameter.empty


def refuse_missing_closure(optimizer: torch.optim.Optimizer) -> None:
    """Refuses a step without a closure where the optimizer cannot do without.

    Raises:
        TypeError: names the optimizer, and says what to do.
    """
    if needs_closure(type(optimizer).step):
        raise TypeError(
            f"{type(optimizer).__name__} evaluates the loss several times a step, so it needs a closure: "
            f"opt.step(closure), where {BY_HAND}."
        )


def refuse_unweighted_closure() -> NoReturn:
    """Refuses a closure in which no example was weighted.

    Raises:
        RuntimeError: always; says what to do.
    """
    raise RuntimeError(
        "the closure called neither opt.backward(losses) nor opt.reweight(losses), so its gradient would go round the "
        f"weights. With a closure, {BY_HAND}; without one, call opt.backward(losses), then opt.step()."
    )
