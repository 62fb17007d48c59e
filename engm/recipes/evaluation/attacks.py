"""Attacks by the names that ``engm evaluate`` takes, each run on a network and a set of images."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engm.adversarial import PGD, AutoAttackProgress, DeepFool, autoattack
from engm.adversarial.autoattack import CLASSES_NEEDED
from engm.adversarial.ball import Norm
from engm.checks import check_name

from ..accuracy import evaluate, pgd20
from ..data import Source, Split

_UNTARGETED = "autoattack-untargeted"
ATTACKS = ("natural", "pgd20", "pgd50", "pgd100", "pgd20-ce", "autoattack", "autoattack-rand", _UNTARGETED, "deepfool")
WITHOUT_RADIUS = ("natural", "deepfool")
"""Attacks that no radius and no norm of a ball have a part in."""

_VERSIONS: dict[str, dict[str, Any]] = {
    "autoattack": {"version": "standard"},
    "autoattack-rand": {"version": "rand"},
    _UNTARGETED: {"version": "custom", "attacks": ["apgd-ce", "fab", "square"]},
}
_FEWEST_CLASSES = {"autoattack": CLASSES_NEEDED["apgd-t"], "autoattack-rand": CLASSES_NEEDED["apgd-dlr"]}
_PGD = re.compile(r"pgd0*(\d+)(-ce|-margin)?")


class Tell(Protocol):
    """Called while an attack runs."""

    def __call__(self, done: int, total: int | None, more: str = "") -> None:
        """So much is done, of so much (None where nobody knows), and what is going on in particular."""


@dataclass(frozen=True)
class Ball:
    """Where adversarial examples are looked for.

    Attributes:
        eps: radius, in units of pixels in [0, 1].
        norm: ``"linf"`` or ``"l2"``.
    """

    eps: float
    norm: Norm


def canonical_attack(name: str) -> str:
    """A name out of :data:`ATTACKS`, with any number of steps behind ``pgd``, as results are kept under it.

    Raises:
        ValueError: the name is unknown; the message says which is nearest.
    """
    typed = name.strip().lower()
    match = _PGD.fullmatch(typed)
    if match and int(match[1]) >= 1:
        return f"pgd{match[1]}{'-ce' if match[2] == '-ce' else ''}"
    check_name(typed, ATTACKS, what="attack")
    return typed


def check_classes(name: str, classes: int) -> None:
    """Refuses an attack that makes no sense with so few classes.

    Raises:
        ValueError: it is one; the message names one that does.
    """
    needed = _FEWEST_CLASSES.get(name, 0)
    if classes < needed:
        raise ValueError(
            f"--attack {name} needs {needed} classes, and there are {classes}: take --attack {_UNTARGETED}"
        )


def pgd_named(name: str, ball: Ball, *, stop_when_broken: bool = True) -> PGD | None:
    """The attack behind ``pgdN`` (margin loss) and ``pgdN-ce`` (cross-entropy); None for other names.

    Args:
        name: of the attack.
        ball: where to look.
        stop_when_broken: whether an example is left as it is once it is misclassified. It is then hardly beyond the
            boundary of that network, and within another's.
    """
    match = _PGD.fullmatch(name)
    if match is None:
        return None
    steps = int(match[1])
    found = pgd20(ball.eps, ball.norm, steps)
    loss = "ce" if match[2] == "-ce" else found.loss
    return PGD(ball.eps, found.step_size, steps, norm=ball.norm, loss=loss, stop_when_broken=stop_when_broken)


def run_attack(
    name: str, net: nn.Module, test: Source, ball: Ball, batch_size: int, tell: Tell, made_on: nn.Module | None = None
) -> dict[str, Any]:
    """Runs an attack.

    Args:
        name: from :func:`canonical_attack`.
        net: the network, on the device of the images.
        test: the images.
        ball: where to look; with a radius of 0 there is no attack.
        batch_size: images at a time.
        tell: told how far it is.
        made_on: another network that the adversarial examples are made on.

    Returns:
        ``accuracy`` and details of the attack; for DeepFool ``rho``.

    Raises:
        ValueError: an attack that does not transfer.
    """
    tell(0, None)
    if made_on is not None and name in WITHOUT_RADIUS:
        raise ValueError(f"{name} makes no adversarial examples within a radius that could be taken to another network")
    if name == "deepfool":
        return _deepfool(net, test, batch_size, tell)
    if name == "natural" or ball.eps == 0:
        return {"accuracy": evaluate(net, test, batch_size=batch_size, on_batch=tell).natural}
    if name.startswith("autoattack"):
        return _autoattack(name, net, test, ball, batch_size, tell, made_on)
    attack = pgd_named(name, ball, stop_when_broken=made_on is None)
    found = evaluate(net, test, attack, batch_size=batch_size, on_batch=tell, made_on=made_on)
    return {"accuracy": found.robust, "step_size": 0.0 if attack is None else attack.step_size}


def _autoattack(
    name: str, net: nn.Module, test: Source, ball: Ball, batch_size: int, tell: Tell, made_on: nn.Module | None
) -> dict[str, Any]:
    def follow(progress: AutoAttackProgress) -> None:
        where = f": {progress.attack}, {progress.number} of {progress.attacks}, forward passes"
        tell(progress.passes, None, where)

    x, y = everything(test, batch_size)
    outcome = autoattack(
        net if made_on is None else made_on,
        x,
        y,
        eps=ball.eps,
        norm=ball.norm,
        batch_size=batch_size,
        **_VERSIONS[name],
        on_progress=follow,
    )
    if made_on is not None:
        return {"accuracy": evaluate(net, Split(outcome.inputs, y), batch_size=batch_size, on_batch=tell).natural}
    warnings = {"warnings": list(outcome.warnings)} if outcome.warnings else {}
    return {
        "accuracy": outcome.robust,
        "reported": outcome.reported,
        "attacks": dict(outcome.per_attack),
        **warnings,
    }


def _deepfool(net: nn.Module, test: Source, batch_size: int, tell: Callable[[int, int], None]) -> dict[str, Any]:
    """Mean distance to the closest point that is classified otherwise, of the examples where one was found."""
    attack = DeepFool()
    distances, broken = [], []
    rows = torch.arange(len(test)).split(batch_size)
    for number, (x, _) in enumerate(test.batches(rows), start=1):
        result = attack(net, x)
        tell(number, len(rows))
        distances.append(result.distances)
        broken.append(result.broken)
    far, found = torch.cat(distances), torch.cat(broken)
    rho = float(far[found].mean()) if bool(found.any()) else None
    return {"rho": rho, "found": float(found.float().mean())}


def everything(test: Source, batch_size: int) -> tuple[Tensor, Tensor]:
    """All images ``[n, C, H, W]`` in [0, 1] and labels ``[n]`` at once."""
    parts = list(test.batches(torch.arange(len(test)).split(batch_size)))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
