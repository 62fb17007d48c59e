"""Everything that ``engm evaluate`` may ask of a run or of a file of weights, in the order in which it is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import RunConfig
from ..data import Dataset
from ..runs.files import RunFolder, Which
from ..training.building import check_radius, load_dataset
from .asking import Corrupted, OnProgress, OnResult, Question, Subject, ask, attacked, check_eps, first_examples
from .attacks import WITHOUT_RADIUS, canonical_attack, check_classes
from .corruptions import load_corruptions
from .subjects import WeightsFile, of_run, source_of

Place = RunFolder | WeightsFile
Answers = dict[str, list[tuple[Question, dict[str, Any]]]]
"""What was found, by the subject's name: each question and its answer."""


@dataclass(frozen=True)
class Wanted:
    """What is asked.

    Attributes:
        attacks: names of attacks.
        checkpoints: of a run.
        examples: the first so many images; None: all.
        threat: norm of the ball; None: the run's (of a file: l-inf).
        eps: radius; None: the run's, or the usual one of the norm.
        sweep: radii in the place of one.
        corruptions: a folder as CIFAR-10-C's.
        transfer: where the network is that the adversarial examples are made on; None: the network itself.
        batch_size: images at a time.
    """

    attacks: Sequence[str]
    checkpoints: Sequence[Which] = ("best", "last")
    examples: int | None = None
    threat: str | None = None
    eps: float | None = None
    sweep: Sequence[float] = ()
    corruptions: Path | None = None
    transfer: Place | None = None
    batch_size: int = 500

    def __post_init__(self) -> None:
        """Looks at what can be looked at before anything is loaded.

        Raises:
            ValueError: an unknown attack, a radius that is none, both one radius and several, or a sweep or transfer of
                an attack that has no radius.
        """
        object.__setattr__(self, "attacks", tuple(dict.fromkeys(canonical_attack(name) for name in self.attacks)))
        for eps in (*self.sweep, *(() if self.eps is None else (self.eps,))):
            check_eps(eps)
        if self.sweep and self.eps is not None:
            raise ValueError("--eps and --eps-sweep say the same thing: leave one of them out")
        if list(self.sweep) != sorted(set(self.sweep)):
            raise ValueError(f"--eps-sweep must be rising radii, got {', '.join(f'{eps:g}' for eps in self.sweep)}")
        without = [name for name in self.attacks if name in WITHOUT_RADIUS]
        if without and (self.sweep or self.transfer is not None):
            option = "--eps-sweep" if self.sweep else "--transfer-from"
            raise ValueError(f"{option} is for attacks within a radius, not for {', '.join(without)}")


def evaluated(
    place: Place,
    wanted: Wanted,
    device: torch.device,
    *,
    data_root: Path | None = None,
    on_result: OnResult | None = None,
    on_progress: OnProgress | None = None,
) -> Answers:
    """Asks everything; answers are kept beside the run or the file, and known ones are not computed again.

    Args:
        place: a run, or a file.
        wanted: what is asked.
        device: where to compute.
        data_root: where a named data set of a run lies, if not where it lay in training.
        on_result: called with every answer.
        on_progress: called while something is computed.

    Raises:
        ValueError, FileNotFoundError, CheckpointError: something is not there, or does not fit; what was found is kept.
    """
    config = place.config(data_root) if isinstance(place, RunFolder) else place.config
    attack = _with_threat(config, wanted)
    if wanted.transfer is not None and isinstance(wanted.transfer, RunFolder):
        wanted.transfer.config()  # is a run there?
    if isinstance(place, RunFolder):
        place.check_data_there(config)
    dataset = load_dataset(config, device, validation=isinstance(place, RunFolder))
    for name in wanted.attacks:
        check_classes(name, dataset.classes)
    radii = [attack.eps or 0.0] if not wanted.sweep else list(wanted.sweep)
    for eps in radii:
        check_radius(attack, dataset, eps)
    questions: list[Question] = []
    if wanted.corruptions is not None:
        found = load_corruptions(wanted.corruptions, dataset.train.shape, dataset.classes, wanted.examples)
        questions += [Corrupted(corruption, wanted.batch_size, device) for corruption in found]
    test = first_examples(dataset.test, wanted.examples) if wanted.attacks else dataset.test
    answers: Answers = {}
    for subject in _subjects(place, config, wanted, dataset, device):
        source = None if wanted.transfer is None else source_of(wanted.transfer, subject.name, dataset, device)
        asked = [*attacked(wanted.attacks, test, radii, attack.ball, wanted.batch_size, source), *questions]
        results = ask(subject, asked, place.evaluations_file, on_result=on_result, on_progress=on_progress)
        answers[subject.name] = list(zip(asked, results, strict=True))
    return answers


def _with_threat(config: RunConfig, wanted: Wanted) -> RunConfig:
    """The configuration with the norm and the radius that are asked for; another norm has its own usual radius."""
    eps = wanted.eps
    if wanted.threat is not None and wanted.threat != config.threat:
        return replace(config, threat=wanted.threat, eps=eps, step_size=None).resolved()
    return config if eps is None else replace(config, eps=eps)


def _subjects(
    place: Place, config: RunConfig, wanted: Wanted, dataset: Dataset, device: torch.device
) -> Iterator[Subject]:
    if isinstance(place, WeightsFile):
        yield place.subject(dataset, device)
        return
    net: nn.Module | None = None
    for which in wanted.checkpoints:
        subject = of_run(place, which, config, dataset, device, net)
        net = subject.net
        yield subject
