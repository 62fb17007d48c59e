"""Evaluating the checkpoints of a run on the test set, attack by attack, with results kept beside the run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engm.adversarial import PGD, AutoAttackProgress, DeepFool, autoattack
from engm.checks import check_name

from ..accuracy import evaluate, pgd20
from ..config import RunConfig
from ..data import Dataset, Source, identity
from ..storage.atomic_files import read_json, write_json
from ..training.building import build_network, check_radius, load_dataset, load_weights
from .files import RunFolder, Which

ATTACKS = ("natural", "pgd20", "pgd20-ce", "autoattack", "deepfool")
_PGD = re.compile(r"pgd(\d+)(-ce)?")


def check_attacks(names: Sequence[str]) -> None:
    """Looks the names up: those of :data:`ATTACKS`, with any number of steps behind ``pgd``.

    Raises:
        ValueError: a name is unknown; the message says which is nearest.
    """
    for name in names:
        match = _PGD.fullmatch(name)
        if not (match and int(match[1]) >= 1):
            check_name(name, ATTACKS, what="attack")


def assess(
    folder: RunFolder,
    attacks: Sequence[str],
    *,
    checkpoints: Sequence[Which] = ("best", "last"),
    examples: int | None = None,
    eps: float | None = None,
    batch_size: int = 500,
    data_root: Path | None = None,
    device: torch.device,
    dataset: Dataset | None = None,
    on_result: Callable[[str, str, dict[str, Any]], None] | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Runs every attack on every checkpoint; each result is written to ``evaluation.json`` as soon as it is there.

    A result that is there already, of the same weights, images and radius, is not computed again.

    Args:
        folder: folder of the run.
        attacks: ``"natural"``, ``"pgdN"`` (N steps on the margin loss, see
            :func:`engm.recipes.accuracy.pgd20`), ``"pgdN-ce"`` (cross-entropy),
            ``"autoattack"``, ``"deepfool"`` (mean l2 distance to the closest adversary, the paper's rho).
        checkpoints: the checkpoints to attack.
        examples: the first so many of the test set; default all.
        eps: radius; default the run's.
        batch_size: examples at a time.
        data_root: where a named data set lies, if not where it lay in training.
        device: where to compute.
        dataset: ``None`` to load the one that the run names.
        on_result: called with checkpoint, attack and result.
        on_progress: called while an attack runs with what it does, how much is done, and of how much, if that is known.

    Returns:
        ``{checkpoint: {attack: [result, ...]}}``, a result for each choice of weights, examples and radius; it has
        ``accuracy`` (DeepFool: ``rho``, ``None`` if it found no adversary), ``examples``, ``eps``, ``epoch``, the
        name of the ``checkpoint`` and the identity of the images as ``data``.

    Raises:
        ValueError: an unknown attack, or data that does not fit the network.
        FileNotFoundError: no run, or no such checkpoint.
        CheckpointError: it is damaged.
    """
    check_attacks(attacks)
    config = folder.config(data_root)
    dataset = load_dataset(config, device) if dataset is None else dataset.to(device)
    test: Source = dataset.test
    if examples is not None:
        if not 1 <= examples <= len(test):
            raise ValueError(f"examples must lie between 1 and {len(test)}, the size of the test set; got {examples}")
        test = test.take(torch.arange(examples))
    radius = eps if eps is not None else config.eps or 0.0
    if not (isfinite(radius) and radius >= 0):
        raise ValueError(f"eps must be a finite number of at least 0, got {radius}")
    check_radius(config, dataset, radius)
    path = folder.evaluations_file
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    images = identity(test)
    net = build_network(config, dataset).to(device).eval()
    attacks = [re.sub(r"pgd0*(?=\d)", "pgd", name) for name in attacks]
    for which in checkpoints:
        kept = folder.weights(which)
        load_weights(net, kept.weights, dataset)
        for attack in attacks:
            settings = {
                "checkpoint": kept.checkpoint,
                "epoch": kept.epoch,
                "examples": len(test),
                "data": images,
                "eps": radius,
            }
            known = found.setdefault(which, {}).setdefault(attack, [])
            result = next((entry for entry in known if settings.items() <= entry.items()), None)
            if result is None:
                told = partial(_tell, on_progress, f"{which}, {attack}")
                result = {**settings, **_run(attack, net, test, radius, config, batch_size, told)}
                known.append(result)
                write_json(path, found)
            if on_result is not None:
                on_result(which, attack, result)
    return found


OnProgress = Callable[[str, int, int | None], None]
"""Called with what is going on, how much of it is done, and how much there is; None where nobody knows."""


def _tell(on_progress: OnProgress | None, title: str, done: int, total: int | None, more: str = "") -> None:
    if on_progress is not None:
        on_progress(title + more, done, total)


def _run(
    name: str,
    net: nn.Module,
    test: Source,
    eps: float,
    config: RunConfig,
    batch_size: int,
    tell: Callable[..., None],
) -> dict[str, Any]:
    def tell_autoattack(progress: AutoAttackProgress) -> None:
        where = f": {progress.attack}, {progress.number} of {progress.attacks}, forward passes"
        tell(progress.passes, None, where)

    tell(0, None)
    if name == "natural":
        return {"accuracy": evaluate(net, test, batch_size=batch_size, on_batch=tell).natural}
    if name == "deepfool":
        return _deepfool(net, test, batch_size, tell)
    if name == "autoattack":
        x, y = _everything(test, batch_size)
        outcome = autoattack(net, x, y, eps=eps, norm=config.ball, batch_size=batch_size, on_progress=tell_autoattack)
        return {"accuracy": outcome.robust, "reported": outcome.reported, "attacks": dict(outcome.per_attack)}
    match = _PGD.fullmatch(name)
    if match is None:
        raise ValueError(f"unknown attack {name!r}")
    steps = int(match[1])
    attack = pgd20(eps, config.ball, steps)
    if match[2]:
        attack = PGD(eps, attack.step_size, steps, norm=config.ball, stop_when_broken=True)
    found = evaluate(net, test, attack, batch_size=batch_size, on_batch=tell)
    return {"accuracy": found.robust, "step_size": attack.step_size}


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


def _everything(test: Source, batch_size: int) -> tuple[Tensor, Tensor]:
    parts = list(test.batches(torch.arange(len(test)).split(batch_size)))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
