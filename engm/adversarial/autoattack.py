"""How robust a network is under AutoAttack, the evaluation that robust accuracies are compared by.

The attacks are those of the package ``pyautoattack``. Here are the conditions that they run under (evaluation mode,
float32, nothing captured, no gradient and no random state left behind), and a recount of the accuracy from the images
that come back.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .ball import Norm, check_examples, lengths
from .losses import margin
from .modes import evaluation_mode, paused

ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
"""What ``attacks`` may name."""

CLASSES_NEEDED = {"apgd-t": 4, "apgd-dlr": 3}
"""The fewest classes for which an attack makes sense; two for the others."""

TOLERANCE = 1e-6
"""How far, in units of the larger of the pixel range and the radius, rounding may carry an image out of the ball."""

_ROUNDING = 1e-3  # below this margin, relative to the largest logit, an image's class may depend on the batch around it
_NORMS = {"linf": "Linf", "l2": "L2"}
_BEGINS = re.compile(r"running \S+")
_SUCCESSES = re.compile(r"(\S+) - \d+/\d+ - (\d+) out of \d+ successfully perturbed")


@dataclass(frozen=True)
class AutoAttackProgress:
    """How far a call of :func:`autoattack` is.

    Attributes:
        attack: the attack that runs; ``"clean"`` before the first.
        number: its number, from 1; 0 before the first.
        attacks: how many attacks there are.
        passes: forward passes that it has taken.
    """

    attack: str
    number: int
    attacks: int
    passes: int


@dataclass(frozen=True)
class AutoAttackResult:
    """What AutoAttack found.

    Attributes:
        inputs: ``[n, C, H, W]``, adversarial where an attack succeeded, natural elsewhere.
        robust: fraction classified correctly at ``inputs``, recounted in evaluation mode and float32.
        reported: the fraction that pyautoattack itself counted.
        per_attack: fraction still standing after each attack, in the order they ran, ``"clean"`` first; attacks that
            found nobody left do not appear. Read from pyautoattack's log; empty if that does not account for the images
            that were moved.
        warnings: what pyautoattack says against trusting its figure (zero gradients, randomised outputs, ...).
    """

    inputs: Tensor
    robust: float
    reported: float
    per_attack: dict[str, float]
    warnings: tuple[str, ...] = ()


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    batch_size: int = 500,
    version: Literal["standard", "plus", "rand", "custom"] = "standard",
    seed: int = 0,
    attacks: Sequence[str] | None = None,
    log_path: str | Path | None = None,
    on_progress: Callable[[AutoAttackProgress], None] | None = None,
) -> AutoAttackResult:
    """Runs AutoAttack (Croce and Hein, 2020) and recounts the accuracy from the images that it returns.

    The model runs as it is, in float32: a model with other parameters or buffers is refused rather than copied, and
    autocast is switched off. (Whether float32 products are rounded to TF32 stays with ``torch.backends``.) Modes,
    ``requires_grad``, ``p.grad`` and torch's random state are afterwards as before.

    Args:
        model: maps images to logits ``[n, K]``; float32.
        x: natural images ``[n, C, H, W]``, float32, in [0, 1]; may be on another device than the model.
        y: labels ``[n]``.
        eps: radius of the ball, in units of the pixels.
        norm: ``"linf"`` or ``"l2"``, the norm of the ball.
        batch_size: number of images that are attacked at a time.
        version: ``"standard"`` is the one to report; ``"custom"`` runs ``attacks``.
        seed: of the attacks' random draws.
        attacks: names out of :data:`ATTACKS`, with ``version="custom"`` and only then.
        log_path: file that pyautoattack's log is appended to. Without a file only the log's warnings are kept, in the
            result.
        on_progress: called after every forward pass; may raise to end the evaluation.

    Returns:
        The images and the accuracies on them.

    Raises:
        ModuleNotFoundError: pyautoattack is not installed.
        ValueError: images, labels, radius, attacks or the model's dtype are not as above, or there are too few classes
            for an attack.
        RuntimeError: a returned image lies outside of the ball or of [0, 1], or its recount contradicts pyautoattack's
            by more than rounding.
    """
    check_examples(x, y)
    _check(model, x, eps, norm, batch_size, version, attacks)
    package = _package()
    device = next((p.device for p in model.parameters()), x.device)
    x, y = x.detach(), y.detach()
    with _conditions(model, device), _logged(log_path) as records:
        adversary = package.AutoAttack(
            model,
            norm=_NORMS[norm],
            eps=eps,
            seed=seed,
            version=version,
            attacks=None if attacks is None else list(attacks),
            device=device,
        )
        _fit_to_classes(adversary, model(x[:1].to(device)).shape[-1])
        with _followed(model, records, adversary.attacks_to_run, on_progress):
            inputs, predicted = adversary.run_standard_evaluation(x, y, batch_size=batch_size)
        _check_images(inputs, x, eps, norm)
        logits = torch.cat([model(part.to(device)) for part in inputs.split(batch_size)]).to(y.device)
    standing = predicted == y
    robust = logits.argmax(dim=1) == y
    _check_recount(logits, y, robust, standing)
    messages = [record.getMessage() for record in records]
    return AutoAttackResult(
        inputs=inputs,
        robust=int(robust.sum()) / len(y),
        reported=int(standing.sum()) / len(y),
        per_attack=_per_attack(messages, standing, (inputs != x).flatten(1).any(dim=1)),
        warnings=tuple(dict.fromkeys(r.getMessage() for r in records if r.levelno >= logging.WARNING)),
    )


def _package() -> Any:
    try:
        return importlib.import_module("pyautoattack")
    except ModuleNotFoundError as error:
        if error.name != "pyautoattack":
            raise
        raise ModuleNotFoundError("AutoAttack needs pyautoattack: pip install 'engm[autoattack]'") from error


def _check(
    model: nn.Module, x: Tensor, eps: float, norm: str, batch_size: int, version: str, attacks: Sequence[str] | None
) -> None:
    if x.dim() != 4 or x.dtype != torch.float32:
        raise ValueError(f"AutoAttack needs float32 images [n, C, H, W], got {x.dtype} {list(x.shape)}")
    if norm not in _NORMS or not eps > 0 or batch_size < 1:
        raise ValueError(
            f"AutoAttack needs norm 'linf' or 'l2', eps > 0 and batch_size >= 1, got {norm!r}, {eps} and {batch_size}"
        )
    if version not in ("standard", "plus", "rand", "custom"):
        raise ValueError(f"AutoAttack knows version='standard', 'plus', 'rand' and 'custom', got {version!r}")
    if (version == "custom") != bool(attacks) or any(name not in ATTACKS for name in attacks or ()):
        raise ValueError(
            f"version='custom' runs attacks out of {', '.join(ATTACKS)}, the other versions take none; got "
            f"version={version!r} and attacks={attacks!r}"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(
                f"AutoAttack needs a float32 model, and its '{name}' is {tensor.dtype}; pass a converted copy, "
                "copy.deepcopy(model).float()"
            )


@contextmanager
def _conditions(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts the model in evaluation mode and float32 inside the context, with nothing captured and no gradients.

    Afterwards modes, ``requires_grad``, random states and whatever traces the interpreter are as before.
    """
    # FAB calls backward(), which would add to the gradients of parameters that require any.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The attacks seed every CUDA device, but only where CUDA is in use is there a state to keep.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    tracing = sys.gettrace()  # one of the checks ends whatever debugger or coverage tool runs
    with (
        evaluation_mode(model),
        paused(model),
        torch.random.fork_rng(list(devices)),
        torch.autocast(device.type, enabled=False),
        torch.no_grad(),
    ):
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            sys.settrace(tracing)


class _Collector(logging.Handler):
    """A log handler that keeps all records in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def _logged(path: str | Path | None) -> Iterator[list[logging.LogRecord]]:
    """Takes pyautoattack's log into a list, and a file if asked to, and keeps it off the terminal."""
    collector = _Collector()
    handlers: list[logging.Handler] = [collector] if path is None else [collector, logging.FileHandler(path)]
    logger = logging.getLogger("auto-attack")
    before = logger.handlers, logger.propagate, logger.level
    logger.handlers, logger.propagate = handlers, False
    logger.setLevel(logging.DEBUG)
    try:
        yield collector.records
    finally:
        logger.handlers, logger.propagate = before[0], before[1]
        logger.setLevel(before[2])
        for handler in handlers:
            handler.close()


@contextmanager
def _followed(
    model: nn.Module,
    records: Sequence[logging.LogRecord],
    attacks: Sequence[str],
    on_progress: Callable[[AutoAttackProgress], None] | None,
) -> Iterator[None]:
    """Tells after every forward pass of the model how far the attacks are, by what the log says of them."""
    if on_progress is None:
        yield
        return
    read, number, passes = 0, 0, 0

    def told(*_: object) -> None:
        nonlocal read, number, passes
        passes += 1
        for record in records[read:]:
            if _BEGINS.fullmatch(record.getMessage()):
                number, passes = number + 1, 1
        read = len(records)
        on_progress(AutoAttackProgress("clean" if number == 0 else attacks[number - 1], number, len(attacks), passes))

    handle = model.register_forward_hook(told)
    try:
        yield
    finally:
        handle.remove()


def _fit_to_classes(adversary: Any, classes: int) -> None:
    """Gives the targeted attacks as many target classes as there are, up to the nine of the standard version.

    Raises:
        ValueError: an attack needs more classes than there are.
    """
    needed = max(CLASSES_NEEDED.get(name, 2) for name in adversary.attacks_to_run)
    if classes < needed:
        raise ValueError(
            f"with {classes} classes there is no {'/'.join(adversary.attacks_to_run)}, which needs {needed}; run "
            "version='custom' with attacks=['apgd-ce', 'fab', 'square']"
        )
    for attack in (adversary.apgd_targeted, adversary.fab):
        attack.n_target_classes = min(attack.n_target_classes, classes - 1)


def _check_images(inputs: Tensor, x: Tensor, eps: float, norm: Norm) -> None:
    """Refuses images outside of the ball or of [0, 1]."""
    distance = lengths(inputs.double() - x.double(), norm).max().item()
    low, high = (value.item() for value in torch.aminmax(inputs))
    # Comparisons with a NaN are false, so that an image with a NaN is refused.
    if not (distance <= eps + TOLERANCE * max(1.0, eps) and low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise RuntimeError(
            f"pyautoattack returned images outside of the {norm} ball of radius {eps:.6g} or of [0, 1]: distances up "
            f"to {distance:.6g}, values in [{low:.6g}, {high:.6g}]; its accuracy cannot be trusted"
        )


def _check_recount(logits: Tensor, y: Tensor, robust: Tensor, standing: Tensor) -> None:
    """Refuses a count of pyautoattack's (``standing [n]``) that the recount (``robust [n]``) contradicts."""
    undecided = margin(logits, y).abs() <= _ROUNDING * logits.abs().amax(dim=1)
    contradictions = int(((robust != standing) & ~undecided).sum())
    if contradictions:
        raise RuntimeError(
            f"the recounted robust accuracy is {int(robust.sum()) / len(y):.4f} and pyautoattack reports "
            f"{int(standing.sum()) / len(y):.4f}; {contradictions} of {len(y)} images contradict it by more than "
            "rounding. Is the model deterministic, and does it treat every image on its own?"
        )


def _per_attack(messages: Sequence[str], standing: Tensor, moved: Tensor) -> dict[str, float]:
    """Accuracy after each attack, from the successes that the log counts; empty if the log misses some.

    Args:
        messages: of the log.
        standing: ``[n]`` bool, which images are classified correctly after all attacks.
        moved: ``[n]`` bool, which images came back changed.
    """
    broken: dict[str, int] = {}
    for name, count in (match.groups() for match in map(_SUCCESSES.fullmatch, messages) if match):
        broken[name] = broken.get(name, 0) + int(count)
    if sum(broken.values()) != int(moved.sum()):
        return {}
    left = int(standing.sum()) + sum(broken.values())
    fractions = {"clean": left / len(standing)}
    for name, count in broken.items():
        left -= count
        fractions[name] = left / len(standing)
    return fractions
