"""What is asked of a network and what was found: known answers of the same weights, images and attack are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from engm.adversarial.ball import Norm

from ..data import Source, identity
from ..storage.atomic_files import read_object, write_json
from .attacks import WITHOUT_RADIUS, Ball, Tell, run_attack
from .corruptions import Corruption

OnProgress = Callable[[str, int, int | None], None]
"""Called with what is going on, how much of it is done, and how much there is; None where nobody knows."""

OnResult = Callable[[str, str, dict[str, Any]], None]
"""Called with a subject's name, what was asked, and the result."""


@dataclass(frozen=True)
class Subject:
    """A network that is looked at.

    Attributes:
        name: heading of its results: ``best`` and ``last`` of a run, ``weights`` of a file.
        net: the network, in evaluation mode, on the device of the images.
        facts: what tells its weights from others, as results keep it.
        threat: the norm that older results are of, which do not say it.
    """

    name: str
    net: nn.Module
    facts: dict[str, Any]
    threat: str


class Question(Protocol):
    """Something that is asked of a subject."""

    @property
    def name(self) -> str:
        """The name that results are kept under."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the answer depends on besides the subject, as results keep it."""

    def answer(self, net: nn.Module, tell: Tell) -> dict[str, Any]:
        """The answer, as JSON can hold it."""


@dataclass(frozen=True)
class Attacked:
    """How accurate is it under an attack?

    Attributes:
        attack: from :func:`engm.recipes.evaluation.attacks.canonical_attack`.
        test: the images.
        images: their identity.
        ball: where adversarial examples are looked for.
        batch_size: images at a time.
        made_on: another subject that the adversarial examples are made on.
    """

    attack: str
    test: Source
    images: str
    ball: Ball
    batch_size: int
    made_on: Subject | None = None

    @property
    def name(self) -> str:
        """The attack; ``transfer-`` stands in front where its examples are another network's."""
        return self.attack if self.made_on is None else f"transfer-{self.attack}"

    @property
    def settings(self) -> dict[str, Any]:
        """Images and ball, and the network that the examples are made on."""
        ball = {} if self.attack in WITHOUT_RADIUS else {"eps": self.ball.eps, "threat": self.ball.norm}
        source = {} if self.made_on is None else {"made_on": self.made_on.facts, "all_steps": True}
        return {"examples": len(self.test), "data": self.images, **ball, **source}

    def answer(self, net: nn.Module, tell: Tell) -> dict[str, Any]:
        """Accuracy, and details of the attack."""
        made_on = None if self.made_on is None else self.made_on.net
        return run_attack(self.attack, net, self.test, self.ball, self.batch_size, tell, made_on)


@dataclass(frozen=True)
class Corrupted:
    """How accurate is it on images with a common corruption?

    Attributes:
        corruption: the images.
        batch_size: images at a time.
        device: where the network is.
    """

    corruption: Corruption
    batch_size: int
    device: torch.device

    @property
    def name(self) -> str:
        """``corruption-`` and its name."""
        return f"corruption-{self.corruption.name}"

    @property
    def settings(self) -> dict[str, Any]:
        """The images."""
        return {"examples": self.corruption.examples, "data": self.corruption.identity}

    def answer(self, net: nn.Module, tell: Tell) -> dict[str, Any]:
        """Mean accuracy over the severities, and of each."""
        return self.corruption.accuracies(net, self.batch_size, self.device, tell)


def results_of(path: Path) -> dict[str, Any]:
    """``{subject: {question: [result, ...]}}`` out of a file of results; nothing where there is no file."""
    return read_object(path) if path.is_file() else {}


def known_answer(known: Sequence[dict[str, Any]], settings: Mapping[str, Any], threat: str) -> dict[str, Any] | None:
    """The first result with these settings; older ones, which do not say the norm of their ball, are of ``threat``."""
    older = {"threat": threat} if "threat" in settings else {}
    return next((entry for entry in known if settings.items() <= {**older, **entry}.items()), None)


def ask(
    subject: Subject,
    questions: Sequence[Question],
    path: Path,
    *,
    on_result: OnResult | None = None,
    on_progress: OnProgress | None = None,
) -> list[dict[str, Any]]:
    """The answers, read where they are known and else computed; each is written as soon as it is there.

    Args:
        subject: the network.
        questions: what is asked.
        path: file of results, JSON.
        on_result: called with every answer.
        on_progress: called while something is computed.
    """
    found, answers = results_of(path), []
    for question in questions:
        settings = {**subject.facts, **question.settings}
        known = found.setdefault(subject.name, {}).setdefault(question.name, [])
        result = known_answer(known, settings, subject.threat)
        if result is None:
            tell = partial(_tell, on_progress, f"{subject.name}, {question.name}")
            result = {**settings, **question.answer(subject.net, tell)}
            known.append(result)
            write_json(path, found)
        if on_result is not None:
            on_result(subject.name, question.name, result)
        answers.append(result)
    return answers


def first_examples(test: Source, examples: int | None) -> Source:
    """The first so many images, or all.

    Raises:
        ValueError: there are not so many.
    """
    if examples is None:
        return test
    if not 1 <= examples <= len(test):
        raise ValueError(f"examples must lie between 1 and {len(test)}, the size of the test set; got {examples}")
    return test.take(torch.arange(examples))


def check_eps(eps: float) -> float:
    """The same radius.

    Raises:
        ValueError: it is negative or not finite.
    """
    if not (isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a finite number of at least 0, got {eps}")
    return eps


def attacked(
    attacks: Sequence[str],
    test: Source,
    radii: Sequence[float],
    norm: Norm,
    batch_size: int,
    made_on: Subject | None = None,
) -> list[Attacked]:
    """Every attack at every radius; one that knows no radius is asked once."""
    images = identity(test)
    return [
        Attacked(name, test, images, Ball(eps, norm), batch_size, made_on)
        for name in attacks
        for eps in (radii[:1] if name in WITHOUT_RADIUS else radii)
    ]


def _tell(on_progress: OnProgress | None, title: str, done: int, total: int | None, more: str = "") -> None:
    if on_progress is not None:
        on_progress(title + more, done, total)
