"""Evaluating the checkpoints of a run on the test set, attack by attack, with results kept beside the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..data import Dataset
from ..evaluation.asking import OnProgress, OnResult, ask, attacked, check_eps, first_examples, results_of
from ..evaluation.attacks import canonical_attack
from ..evaluation.subjects import of_run
from ..training.building import check_radius, load_dataset
from .files import RunFolder, Which


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
    on_result: OnResult | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Runs every attack on every checkpoint; each result is written to ``evaluation.json`` as soon as it is there.

    A result that is there already, of the same weights, images and radius, is not computed again.

    Args:
        folder: folder of the run.
        attacks: see :data:`engm.recipes.evaluation.attacks.ATTACKS`: ``"natural"``, ``"pgdN"`` (N steps on the margin
            loss, see :func:`engm.recipes.accuracy.pgd20`), ``"pgdN-ce"`` (cross-entropy), ``"autoattack"``,
            ``"deepfool"`` (mean l2 distance to the closest adversary, the paper's rho) and so on.
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
        ``{checkpoint: {attack: [result, ...]}}``, a result for each choice of weights, examples and ball; it has
        ``accuracy`` (DeepFool: ``rho``, ``None`` if it found no adversary), ``examples``, ``eps`` and ``threat`` (of
        attacks within a ball), ``epoch``, the name of the ``checkpoint`` and the identity of the images as ``data``.

    Raises:
        ValueError: an unknown attack, or data that does not fit the network.
        FileNotFoundError: no run, or no such checkpoint.
        CheckpointError: it is damaged.
    """
    names = [canonical_attack(name) for name in attacks]
    config = folder.config(data_root)
    dataset = load_dataset(config, device) if dataset is None else dataset.to(device)
    radius = check_eps(config.eps or 0.0 if eps is None else eps)
    check_radius(config, dataset, radius)
    questions = attacked(names, first_examples(dataset.test, examples), [radius], config.ball, batch_size)
    net = None
    for which in checkpoints:
        subject = of_run(folder, which, config, dataset, device, net)
        net = subject.net
        ask(subject, questions, folder.evaluations_file, on_result=on_result, on_progress=on_progress)
    return results_of(folder.evaluations_file)
